/** One WebSocket as a sender and an awaited stream of whole messages. */

import { openSocket } from "#socket";

import { Disconnected } from "./errors.js";
import { Queue } from "./queue.js";

const MAX_BUFFERED = 4 << 20; // bytes that may wait to be sent before a sender is held back
const LOOK_AGAIN_MS = 5;

export class Connection {
  readonly #url: string;
  readonly #socket: WebSocket;
  readonly #incoming = new Queue<ArrayBuffer>();

  private constructor(url: string, socket: WebSocket) {
    this.#url = url;
    this.#socket = socket;
    socket.addEventListener("message", (event) => this.#incoming.put(event.data as ArrayBuffer));
    socket.addEventListener("close", (event) => this.#end(event));
    socket.addEventListener("error", () => undefined); // a close follows
  }

  /** Rejects with Disconnected where there is no server, or it refuses. */
  static open(url: string): Promise<Connection> {
    return new Promise((resolve, reject) => {
      let socket: WebSocket;
      try {
        socket = openSocket(url);
      } catch (error) {
        reject(new Disconnected(`cannot connect to ${url}: ${String(error)}`));
        return;
      }
      socket.binaryType = "arraybuffer";
      const connection = new Connection(url, socket);
      socket.addEventListener("open", () => resolve(connection));
      socket.addEventListener("error", (event) => {
        const cause = "message" in event && event.message !== "" ? `: ${String(event.message)}` : "";
        reject(new Disconnected(`cannot connect to ${url}${cause}`));
      });
      socket.addEventListener("close", () => reject(new Disconnected(`cannot connect to ${url}`)));
    });
  }

  get isOpen(): boolean {
    return this.#socket.readyState === this.#socket.OPEN;
  }

  /** Waits while too much is on its way. */
  async send(data: Uint8Array<ArrayBuffer>): Promise<void> {
    while (this.isOpen && this.#socket.bufferedAmount > MAX_BUFFERED) {
      await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN_MS));
    }
    if (!this.isOpen) {
      throw new Disconnected(`there is no connection to ${this.#url}`);
    }
    this.#socket.send(data);
  }

  /** Rejects with Disconnected once the connection has ended and everything before is taken. */
  receive(): Promise<ArrayBuffer> {
    return this.#incoming.take();
  }

  close(): void {
    this.#socket.close();
    this.#incoming.fail(new Disconnected("the client was closed"));
  }

  #end(event: CloseEvent): void {
    const reason = event.reason === "" ? "" : `: ${event.reason}`;
    this.#incoming.fail(new Disconnected(`${this.#url} closed the connection (${event.code}${reason})`));
  }
}
