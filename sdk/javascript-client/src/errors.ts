/** Every error of a server as a class, in the tree of `pie_core/errors.py`; `code` is what crosses the wire. */

export class PieError extends Error {
  static readonly code: string = "error";

  constructor(message: string) {
    super(message);
    this.name = new.target.name;
  }

  get code(): string {
    return (this.constructor as typeof PieError).code;
  }
}

export class ConfigError extends PieError {
  static override readonly code: string = "config";
}
export class PluginError extends PieError {
  static override readonly code: string = "plugin";
}

export class LoadError extends PieError {
  static override readonly code: string = "load";
}
export class FetchError extends LoadError {
  static override readonly code: string = "fetch";
}

export class ProgramError extends PieError {
  static override readonly code: string = "program";
}
export class ProgramTooLarge extends ProgramError {
  static override readonly code: string = "program-too-large";
}

export class GuestError extends PieError {
  static override readonly code: string = "guest";
}
export class GuestTrap extends GuestError {
  static override readonly code: string = "guest-trap";
}
export class WorkerLost extends GuestError {
  static override readonly code: string = "worker-lost";
}
export class DeadlineExceeded extends GuestError {
  static override readonly code: string = "deadline-exceeded";
}
export class Cancelled extends GuestError {
  static override readonly code: string = "cancelled";
}

export class RequestError extends PieError {
  static override readonly code: string = "request";
}
export class InvalidRequest extends RequestError {
  static override readonly code: string = "invalid-request";
}
export class Unsupported extends RequestError {
  static override readonly code: string = "unsupported";
}
export class NotFound extends RequestError {
  static override readonly code: string = "not-found";
}
export class PageShared extends RequestError {
  static override readonly code: string = "page-shared";
}
export class OutOfPages extends RequestError {
  static override readonly code: string = "out-of-pages";
}
export class LimitExceeded extends RequestError {
  static override readonly code: string = "limit-exceeded";
}
export class McpRefused extends RequestError {
  static override readonly code: string = "mcp";
}

export class ForwardError extends PieError {
  static override readonly code: string = "forward";
}
export class EngineLost extends PieError {
  static override readonly code: string = "engine-lost";
}

export class ServiceError extends PieError {
  static override readonly code: string = "service";
}
export class ProtocolError extends ServiceError {
  static override readonly code: string = "protocol";
}
export class Unauthenticated extends ServiceError {
  static override readonly code: string = "unauthenticated";
}
export class AccessDenied extends ServiceError {
  static override readonly code: string = "access-denied";
}
export class Unavailable extends ServiceError {
  static override readonly code: string = "unavailable";
}
export class Disconnected extends ServiceError {
  static override readonly code: string = "disconnected";
}

const KINDS = [
  PieError,
  ConfigError,
  PluginError,
  LoadError,
  FetchError,
  ProgramError,
  ProgramTooLarge,
  GuestError,
  GuestTrap,
  WorkerLost,
  DeadlineExceeded,
  Cancelled,
  RequestError,
  InvalidRequest,
  Unsupported,
  NotFound,
  PageShared,
  OutOfPages,
  LimitExceeded,
  McpRefused,
  ForwardError,
  EngineLost,
  ServiceError,
  ProtocolError,
  Unauthenticated,
  AccessDenied,
  Unavailable,
  Disconnected,
] as const;

const BY_CODE = new Map<string, new (message: string) => PieError>(KINDS.map((kind) => [kind.code, kind]));

/** The codes that this client knows. */
export const errorCodes: readonly string[] = [...BY_CODE.keys()];

/** The error that `code` names, or a plain PieError that keeps an unknown code in its text. */
export function errorFromCode(code: string, message: string): PieError {
  const kind = BY_CODE.get(code);
  return kind === undefined ? new PieError(`${code}: ${message}`) : new kind(message);
}
