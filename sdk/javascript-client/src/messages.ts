/** Messages on the wire: MessagePack maps with a `type`; see docs/protocol.md. */

import { decode, encode } from "@msgpack/msgpack";
import { blake3 } from "@noble/hashes/blake3.js";

import { ProtocolError } from "./errors.js";

export const PROTOCOL = 1;
export const CHUNK_BYTES = 256 * 1024;

/** What a client sends; the fields are those of the message called `type`. */
export type Request = { type: string; corr_id: number; [field: string]: unknown };

export type Response = { type: "response"; corr_id: number; ok: boolean; result: string; error_code?: string };

export type ProcessEvent = {
  type: "process_event";
  process_id: string;
  event: "stdout" | "stderr" | "message" | "return" | "error";
  value: string;
  seq?: number;
  dropped?: number;
  is_json?: boolean;
  error_code?: string;
};

export type FileChunk = {
  type: "file";
  process_id: string;
  file_hash: string;
  chunk_index: number;
  total_chunks: number;
  chunk_data: Uint8Array;
  seq?: number;
  dropped?: number;
};

export type Detached = { type: "detached"; process_id: string };

export type McpRequest = {
  type: "mcp_request";
  corr_id: number;
  process_id: string;
  server_name: string;
  method: string;
  params: string;
};

export type Reply = Response | ProcessEvent | FileChunk | Detached | McpRequest;

const REPLIES = new Set(["response", "process_event", "file", "detached", "mcp_request"]);

export function encodeRequest(request: Request): Uint8Array<ArrayBuffer> {
  return encode(request, { ignoreUndefined: true });
}

/** Null for a kind of message that this client does not know: a newer server may have more. */
export function decodeReply(data: ArrayBuffer): Reply | null {
  let reply: unknown;
  try {
    reply = decode(data);
  } catch (error) {
    throw new ProtocolError(`the server sent a message that this client cannot read: ${String(error)}`);
  }
  if (typeof reply !== "object" || reply === null || !("type" in reply)) {
    throw new ProtocolError("the server sent a message without a type");
  }
  return REPLIES.has(String(reply.type)) ? (reply as Reply) : null;
}

/** The BLAKE3 hash in hexadecimal digits. */
export function digest(content: Uint8Array): string {
  return Array.from(blake3(content), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What is sent one message each; an empty file is one empty chunk. */
export function chunksOf(content: Uint8Array): Uint8Array[] {
  const count = Math.max(1, Math.ceil(content.length / CHUNK_BYTES));
  return Array.from({ length: count }, (_, index) =>
    content.subarray(index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES),
  );
}

/** The bytes of several chunks in one piece. */
export function joined(chunks: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(chunks.reduce((size, chunk) => size + chunk.length, 0));
  let place = 0;
  for (const chunk of chunks) {
    whole.set(chunk, place);
    place += chunk.length;
  }
  return whole;
}
