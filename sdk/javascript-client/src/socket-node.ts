/** The WebSocket of Node: its own where it has one (22 and later), else that of the package `ws`. */

import { WebSocket as PackagedSocket } from "ws";

const Kind = (globalThis.WebSocket as typeof WebSocket | undefined) ?? (PackagedSocket as unknown as typeof WebSocket);

export function openSocket(url: string): WebSocket {
  return new Kind(url);
}
