/** One connection to a server: logs in, asks, and brings each process its events; comes back after a disconnect. */

import { Connection } from "./connection.js";
import { Disconnected, errorFromCode, PieError, Unauthenticated } from "./errors.js";
import type { PrivateKey } from "./keys.js";
import {
  chunksOf,
  decodeReply,
  digest,
  encodeRequest,
  type FileChunk,
  joined,
  type McpRequest,
  type ProcessEvent,
  PROTOCOL,
  type Reply,
  type Response,
} from "./messages.js";
import { Event, Process } from "./process.js";
import type { ServerStatus } from "./status.js";

const NOT_NEEDED = "Authenticated (Engine disabled authentication)";
const RETRIES_MS = [50, 100, 200, 500, 1000, 2000, 5000];
const VERSION = "0.1.0";

export type ClientOptions = {
  apiKey?: string;
  username?: string;
  privateKey?: PrivateKey;
  /** A lost connection is made again and processes go on where they were; true unless told. */
  reconnect?: boolean;
};

export type LaunchOptions = { detached?: boolean; priority?: number; trace?: string };

/** Answers an MCP request of a program: the method and its params in, the result out. */
export type McpAnswer = (method: string, params: unknown) => Promise<unknown>;

export type ProgramInfo = { name: string; version: string; hash?: string; shipped?: boolean };
export type ModelInfo = { name: string; [key: string]: unknown };
export type ProcessInfo = { id: string; username: string; program: string; state: string; [key: string]: unknown };

type Answer = { resolve: (result: string) => void; reject: (error: Error) => void };

/** `const client = await Client.connect(url, { apiKey })`. Requests that were open when a connection ended fail with
 * Disconnected, because they may have been done or not. */
export class Client {
  readonly #url: string;
  readonly #options: ClientOptions;
  readonly #open = new Map<number, Answer>();
  readonly #processes = new Map<string, Process>();
  readonly #early = new Map<string, (ProcessEvent | FileChunk)[]>(); // of processes whose id is on its way to us
  readonly #chunks = new Map<string, Uint8Array[]>();
  readonly #mcp = new Map<string, McpAnswer>();
  #connection: Connection | undefined;
  #isClosing = false;
  #isReady = false; // logged in, and nothing of the user's is sent before
  #last = 0;
  /** What the server said of itself. */
  server: Record<string, unknown> = {};

  private constructor(url: string, options: ClientOptions) {
    this.#url = url;
    this.#options = options;
  }

  /** Connects to ws://… or wss://… and logs in. Rejects with Disconnected or Unauthenticated. */
  static async connect(url: string, options: ClientOptions = {}): Promise<Client> {
    const client = new Client(url, options);
    await client.#connect();
    client.#isReady = true;
    void client.#keepReading();
    return client;
  }

  /** Processes go on without us. */
  close(): void {
    this.#isClosing = true;
    this.#connection?.close();
    this.#lose(new Disconnected("the client was closed"));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  // ---- programs

  /** Whether the server has it; with `content`, whether it has just that. */
  async checkProgram(name: string, version: string, content?: Uint8Array): Promise<boolean> {
    const wasm_hash = content === undefined ? undefined : digest(content);
    return JSON.parse(await this.request("check_program", { name, version, wasm_hash })) as boolean;
  }

  /** An artifact of `pie build`, or a component with its manifest. Goes on where an interrupted upload ended.
   * Gives name@version. */
  async install(content: Uint8Array, manifest = "", overwrite = false): Promise<string> {
    const start = Number(await this.request("resume_upload", { program_hash: digest(content) }));
    const fields = { manifest, force_overwrite: overwrite };
    return this.sendChunks("add_program", "program_hash", content, fields, start);
  }

  async programs(): Promise<ProgramInfo[]> {
    return JSON.parse(await this.request("list_programs")) as ProgramInfo[];
  }

  async removeProgram(name: string, version: string): Promise<void> {
    await this.request("remove_program", { name, version });
  }

  // ---- processes

  /** Starts name or name@version. `detached`: no events come here, and nothing printed is kept. Passes of programs with
   * a higher `priority` go first. `trace`: the W3C traceparent of the caller's span. */
  async launch(program: string, input: object = {}, options: LaunchOptions = {}): Promise<Process> {
    const attached = options.detached !== true;
    const { priority, trace: traceparent } = options;
    const fields = { inferlet: program, input: JSON.stringify(input), capture_outputs: attached, priority, traceparent };
    return this.#adopt(await this.request("launch_process", fields), attached);
  }

  /** All of them, or none and an error. */
  async launchMany(
    program: string,
    inputs: readonly object[],
    options: { trace?: string } = {},
  ): Promise<Process[]> {
    const texts = inputs.map((input) => JSON.stringify(input));
    const fields = { inferlet: program, inputs: texts, capture_outputs: true, traceparent: options.trace };
    const found = await this.request("launch_processes", fields);
    return (JSON.parse(found) as string[]).map((id) => this.#adopt(id, true));
  }

  /** Starts a program and gives what it returns. */
  async run(program: string, input: object = {}): Promise<unknown> {
    return (await this.launch(program, input)).result();
  }

  /** The events of a process that nobody has got yet; with `after`, all behind that number that are kept. */
  async attach(processId: string, after?: number): Promise<Process> {
    await this.request("attach_process", { process_id: processId, after });
    return this.#adopt(processId, true);
  }

  async detach(process: Process): Promise<void> {
    await this.request("detach_process", { process_id: process.id });
    if (this.#processes.delete(process.id)) {
      process.lose();
    }
  }

  async processes(includeEnded = false): Promise<ProcessInfo[]> {
    return JSON.parse(await this.request("list_processes", { include_ended: includeEnded })) as ProcessInfo[];
  }

  // ---- the rest

  /** How the server does; with a key of the scope `observe`, its `processes` are those of everybody. */
  async status(): Promise<ServerStatus> {
    return JSON.parse(await this.request("read_status")) as ServerStatus;
  }

  async models(): Promise<ModelInfo[]> {
    return JSON.parse(await this.request("list_models")) as ModelInfo[];
  }

  async loadModel(name: string): Promise<void> {
    await this.request("load_model", { name });
  }

  async unloadModel(name: string): Promise<void> {
    await this.request("unload_model", { name });
  }

  async query(subject: string, record = ""): Promise<unknown> {
    return JSON.parse(await this.request("query", { subject, record })) as unknown;
  }

  async ping(): Promise<void> {
    await this.request("ping");
  }

  /** Offers an MCP server to the programs of this connection. */
  async registerMcpServer(name: string, answer: McpAnswer): Promise<void> {
    this.#mcp.set(name, answer);
    await this.request("register_mcp_server", { name, transport: "stdio" });
  }

  /** Any message of the protocol by its name. Rejects with the error that the server answers with. */
  async request(type: string, fields: Record<string, unknown> = {}): Promise<string> {
    const corr_id = this.#next();
    const answer = this.#expect(corr_id);
    await this.#send({ type, corr_id, ...fields }, corr_id);
    return answer;
  }

  /** Something large, chunk by chunk from `start` on; what the server answers to the last. */
  async sendChunks(
    type: string,
    hashField: string,
    content: Uint8Array,
    fields: Record<string, unknown> = {},
    start = 0,
  ): Promise<string> {
    const corr_id = this.#next();
    const answer = this.#expect(corr_id);
    const chunks = chunksOf(content);
    const heading = { type, corr_id, ...fields, [hashField]: digest(content), total_chunks: chunks.length };
    for (const [index, chunk_data] of chunks.entries()) {
      if (!this.#open.has(corr_id)) {
        break; // refused: the rest need not be sent
      }
      if (index >= start) {
        await this.#send({ ...heading, chunk_index: index, chunk_data }, corr_id);
      }
    }
    return answer;
  }

  // ---- connecting

  async #connect(): Promise<void> {
    const connection = await Connection.open(this.#url);
    this.#connection = connection;
    try {
      await this.#logIn();
    } catch (error) {
      connection.close();
      throw error;
    }
  }

  /** Asked and answered in turn, because nothing else is read yet. */
  async #logIn(): Promise<void> {
    const hello = await this.#ask("hello", { protocol: PROTOCOL, client: `pie-js ${VERSION}` });
    this.server = JSON.parse(hello) as Record<string, unknown>;
    const { apiKey, username, privateKey } = this.#options;
    if (apiKey !== undefined && (this.server["login"] as string[]).includes("api-key")) {
      await this.#ask("auth_by_token", { token: apiKey });
      return;
    }
    const answer = await this.#ask("auth_identify", { username: username ?? "anonymous" });
    if (answer === NOT_NEEDED) {
      return;
    }
    if (privateKey === undefined) {
      throw new Unauthenticated(`${this.#url} asks for credentials: give apiKey, or username and privateKey`);
    }
    const challenge = Uint8Array.from(atob(answer), (letter) => letter.charCodeAt(0));
    const signature = btoa(String.fromCharCode(...(await privateKey.sign(challenge))));
    await this.#ask("auth_prove", { signature });
  }

  async #ask(type: string, fields: Record<string, unknown>): Promise<string> {
    const corr_id = this.#next();
    await this.#send({ type, corr_id, ...fields });
    for (;;) {
      const reply = await this.#receive();
      if (reply.type === "response" && (reply.corr_id === corr_id || reply.corr_id === 0)) {
        if (!reply.ok) {
          throw errorOf(reply);
        }
        return reply.result;
      }
      this.#take(reply);
    }
  }

  #next(): number {
    this.#last = (this.#last % 0xffffffff) + 1;
    return this.#last;
  }

  #expect(corr_id: number): Promise<string> {
    const answer = new Promise<string>((resolve, reject) => this.#open.set(corr_id, { resolve, reject }));
    answer.catch(() => undefined); // it may fail while its request is still being sent
    return answer;
  }

  async #send(message: { type: string; corr_id: number; [field: string]: unknown }, expected?: number): Promise<void> {
    try {
      if (this.#connection === undefined || (expected !== undefined && !this.#isReady)) {
        throw new Disconnected(`there is no connection to ${this.#url}`);
      }
      await this.#connection.send(encodeRequest(message));
    } catch (error) {
      if (expected !== undefined) {
        this.#open.delete(expected);
      }
      throw error;
    }
  }

  async #receive(): Promise<Reply> {
    for (;;) {
      const reply = decodeReply(await (this.#connection as Connection).receive());
      if (reply !== null) {
        return reply;
      }
    }
  }

  async #keepReading(): Promise<void> {
    for (;;) {
      try {
        for (;;) {
          this.#take(await this.#receive());
        }
      } catch (error) {
        const cause = error instanceof PieError ? error : new Disconnected(String(error));
        this.#isReady = false;
        this.#failRequests(cause);
        const mayReturn = cause instanceof Disconnected && !this.#isClosing && this.#options.reconnect !== false;
        if (!mayReturn || !(await this.#comeBack())) {
          this.#connection?.close();
          this.#lose(cause);
          return;
        }
      }
    }
  }

  /** Connects again and asks for what each process has said since; false if the server is gone for good. */
  async #comeBack(): Promise<boolean> {
    for (const delay of RETRIES_MS) {
      await new Promise((resolve) => setTimeout(resolve, delay));
      if (this.#isClosing) {
        return false;
      }
      try {
        await this.#connect();
        for (const process of [...this.#processes.values()]) {
          await this.#attachAgain(process);
        }
        this.#isReady = true;
        return true;
      } catch (error) {
        if (!(error instanceof Disconnected)) {
          return false;
        }
      }
    }
    return false;
  }

  async #attachAgain(process: Process): Promise<void> {
    try {
      await this.#ask("attach_process", { process_id: process.id, after: process.lastSeq });
    } catch (error) {
      if (error instanceof Disconnected || !(error instanceof PieError)) {
        throw error;
      }
      this.#processes.delete(process.id); // it is forgotten there: the others go on
      process.lose(error);
    }
  }

  // ---- what comes

  #take(reply: Reply): void {
    switch (reply.type) {
      case "response":
        this.#takeResponse(reply);
        break;
      case "process_event":
      case "file":
        this.#takeOutput(reply);
        break;
      case "detached":
        this.#processes
          .get(reply.process_id)
          ?.lose(new Disconnected(`another client has attached to the process ${reply.process_id}`));
        this.#processes.delete(reply.process_id);
        break;
      case "mcp_request":
        void this.#answerMcp(reply);
        break;
    }
  }

  #takeResponse(response: Response): void {
    const answer = this.#open.get(response.corr_id);
    this.#open.delete(response.corr_id);
    if (response.ok) {
      answer?.resolve(response.result);
    } else {
      answer?.reject(errorOf(response));
    }
  }

  #takeOutput(reply: ProcessEvent | FileChunk): void {
    const process = this.#processes.get(reply.process_id);
    if (process === undefined) {
      this.#early.set(reply.process_id, [...(this.#early.get(reply.process_id) ?? []), reply]);
    } else {
      this.#give(process, reply);
    }
  }

  #give(process: Process, reply: ProcessEvent | FileChunk): void {
    if (reply.type === "file") {
      this.#giveChunk(process, reply);
      return;
    }
    const value: unknown = reply.is_json === true ? JSON.parse(reply.value) : reply.value;
    process.put(new Event(reply.event, value, reply.seq ?? 0, reply.dropped ?? 0, reply.error_code));
    if (process.hasEnded) {
      this.#processes.delete(process.id);
    }
  }

  #giveChunk(process: Process, chunk: FileChunk): void {
    const before = chunk.chunk_index === 0 ? [] : (this.#chunks.get(process.id) ?? []);
    const chunks = [...before, chunk.chunk_data]; // a transfer that a disconnect cut off starts again
    this.#chunks.set(process.id, chunks);
    if (chunk.chunk_index === chunk.total_chunks - 1) {
      this.#chunks.delete(process.id);
      process.put(new Event("file", joined(chunks), chunk.seq ?? 0, chunk.dropped ?? 0));
    }
  }

  #adopt(processId: string, attached: boolean): Process {
    const process = new Process(this, processId);
    const early = this.#early.get(processId) ?? [];
    this.#early.delete(processId);
    if (attached) {
      this.#processes.set(processId, process);
    }
    for (const reply of early) {
      this.#give(process, reply);
    }
    return process;
  }

  async #answerMcp(request: McpRequest): Promise<void> {
    let ok = true;
    let result: unknown;
    try {
      const answer = this.#mcp.get(request.server_name);
      if (answer === undefined) {
        throw new Error(`no MCP server ${request.server_name} is registered here`);
      }
      result = await answer(request.method, JSON.parse(request.params));
    } catch (error) {
      ok = false; // whatever it is, the program that asked is to learn it
      result = { code: -32000, message: String(error) };
    }
    try {
      await this.#send({ type: "mcp_response", corr_id: request.corr_id, ok, result: JSON.stringify(result ?? null) });
    } catch {
      return; // the connection is gone, and who asked has learnt that
    }
  }

  // ---- the end of a connection

  #failRequests(error: PieError): void {
    for (const answer of this.#open.values()) {
      answer.reject(error);
    }
    this.#open.clear();
  }

  #lose(error: PieError): void {
    this.#failRequests(error);
    for (const process of this.#processes.values()) {
      process.lose(error);
    }
    this.#processes.clear();
  }
}

function errorOf(response: Response): PieError {
  return errorFromCode(response.error_code ?? "error", response.result);
}
