/** The client of a pie server, for browsers and Node. */

export { Client, type ClientOptions, type LaunchOptions, type McpAnswer, type ModelInfo, type ProcessInfo, type ProgramInfo } from "./client.js";
export * from "./errors.js";
export { PrivateKey } from "./keys.js";
export { Event, type EventKind, Process } from "./process.js";
export type * from "./status.js";
