/** A running program as its client sees it: an asynchronous stream of events, and ways to talk to it. */

import type { Client } from "./client.js";
import { Disconnected, errorFromCode, type PieError } from "./errors.js";
import { Queue } from "./queue.js";

export type EventKind = "stdout" | "stderr" | "message" | "file" | "return" | "error";

export class Event {
  constructor(
    readonly kind: EventKind,
    /** Bytes of a file; the return value; text otherwise. */
    readonly value: unknown,
    readonly seq: number,
    /** How many events before this one were lost. */
    readonly dropped: number = 0,
    readonly errorCode: string | undefined = undefined,
  ) {}

  /** What the program printed or said; empty for the other kinds. */
  get text(): string {
    return ["stdout", "stderr", "message"].includes(this.kind) ? String(this.value) : "";
  }

  /** What ended the process. */
  get error(): PieError | undefined {
    return this.kind === "error" ? errorFromCode(this.errorCode ?? "error", String(this.value)) : undefined;
  }

  get isLast(): boolean {
    return this.kind === "return" || this.kind === "error";
  }
}

class NoMore extends Error {}

/** Made by `Client.launch` and `Client.attach`. Events wait here until they are taken. */
export class Process implements AsyncIterable<Event> {
  readonly #client: Client;
  readonly #events = new Queue<Event>();
  readonly #outcome: Promise<Event>;
  #settle!: (event: Event) => void;
  #fail!: (error: Error) => void;
  lastSeq = 0;
  hasEnded = false;

  constructor(
    client: Client,
    readonly id: string,
  ) {
    this.#client = client;
    this.#outcome = new Promise((resolve, reject) => {
      this.#settle = resolve;
      this.#fail = reject;
    });
    this.#outcome.catch(() => undefined); // nobody need ask
  }

  /** Events as they come, the return value or the error last. Throws Disconnected if the server goes. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Event, void, void> {
    for (;;) {
      let event: Event;
      try {
        event = await this.#events.take();
      } catch (error) {
        if (error instanceof NoMore) {
          return;
        }
        throw error;
      }
      yield event;
    }
  }

  /** The return value, whether or not the events before it are taken. Throws what the program ended with. */
  async result(): Promise<unknown> {
    const event = await this.#outcome;
    if (event.error !== undefined) {
      throw event.error;
    }
    return event.value;
  }

  /** A message, which the program gets from `session.receive()`. */
  async signal(message: string): Promise<void> {
    await this.#client.request("signal_process", { process_id: this.id, message });
  }

  /** A file, which the program gets from `session.receive_file()`. */
  async sendFile(content: Uint8Array): Promise<void> {
    await this.#client.sendChunks("transfer_file", "file_hash", content, { process_id: this.id });
  }

  /** No more messages and files will come: `session.receive()` gives None then. */
  async closeInput(): Promise<void> {
    await this.#client.request("close_input", { process_id: this.id });
  }

  async terminate(): Promise<void> {
    await this.#client.request("terminate_process", { process_id: this.id });
  }

  /** No more events come here; the program goes on. */
  async detach(): Promise<void> {
    await this.#client.detach(this);
  }

  /** For the client: an event has come. */
  put(event: Event): void {
    if (this.hasEnded || (event.seq > 0 && event.seq <= this.lastSeq)) {
      return; // it was on its way when the same was asked for again
    }
    this.lastSeq = event.seq;
    this.#events.put(event);
    if (event.isLast) {
      this.hasEnded = true;
      this.#settle(event);
      this.#events.fail(new NoMore());
    }
  }

  /** For the client: no more events will come, because of an error, or of nothing when it was detached on purpose. */
  lose(error?: PieError): void {
    this.#events.fail(error ?? new NoMore());
    this.#fail(error ?? new Disconnected(`the process ${this.id} was detached`));
  }
}
