// What the JavaScript client does against a live server: node javascript_client.mjs SCENARIO URL, with given.json beside.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { WebSocket } from "ws";

const sockets = [];
globalThis.WebSocket = class extends WebSocket {
  constructor(url) {
    super(url);
    sockets.push(this);
  }
};

const pie = await import("@pie-core/client");
const [scenario, url] = process.argv.slice(2);
const given = JSON.parse(readFileSync("given.json", "utf8"));

async function withClient(options, work) {
  const client = await pie.Client.connect(url, { username: "alice", ...options });
  try {
    return await work(client);
  } finally {
    client.close();
  }
}

async function collected(events) {
  const found = [];
  for await (const event of events) {
    found.push(event);
  }
  return found;
}

function shown(events) {
  return events.map((event) => [event.kind, event.kind === "file" ? event.value.length : event.value]);
}

const scenarios = {
  async streams() {
    await withClient({}, async (client) => {
      assert.equal(client.server.protocol, 1);
      await client.ping();
      const running = await client.launch("text-completion", { prompt: "The capital", max_tokens: 4 });
      const events = await collected(running);
      assert.ok(events.length > 1);
      assert.deepEqual(events.map((event) => event.seq), events.map((_, index) => index + 1));
      assert.equal(events.at(-1).kind, "return");
      assert.equal(await running.result(), events.at(-1).value);
      assert.ok(running.hasEnded);
      assert.deepEqual(await collected(running), []);
    });
  },

  async watches() {
    await withClient({}, async (client) => {
      const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
      const running = await client.launch("text-completion", { prompt: "Hi", max_tokens: 4 }, { trace });
      const [other] = await client.launchMany("text-completion", [{ prompt: "Hi", max_tokens: 4 }], { trace });
      await Promise.all([running.result(), other.result()]);
      await assert.rejects(client.launch("echo", {}, { trace: "nonsense" }), /traceparent/);
      const status = await client.status();
      assert.equal(status.state, "ready");
      assert.deepEqual(status.ended, { returned: 2 });
      const engine = status.models[0].replicas[0].engine;
      assert.equal(engine.first_token_seconds.counts.reduce((sum, count) => sum + count), 2);
      assert.ok(engine.passes >= engine.steps && engine.steps > 0);
      assert.deepEqual(status.processes, []);
    });
  },

  async talks() {
    await withClient({}, async (client) => {
      const running = await client.launch("echo");
      await running.signal("one");
      await running.signal("two");
      await running.closeInput();
      assert.deepEqual(shown(await collected(running)), [
        ["stdout", "ready\n"],
        ["message", "ONE"],
        ["message", "TWO"],
        ["return", { heard: true }],
      ]);
      assert.deepEqual(await client.run("echo-input", { n: [1, null, "ü"] }), { n: [1, null, "ü"] });
      const several = await client.launchMany("echo-input", [{ n: 1 }, { n: 2 }]);
      assert.deepEqual(await Promise.all(several.map((each) => each.result())), [{ n: 1 }, { n: 2 }]);
    });
  },

  async files() {
    await withClient({}, async (client) => {
      for (const size of [0, 5, 700_000]) {
        const content = Uint8Array.from({ length: size }, (_, index) => (index * 7) % 251);
        const running = await client.launch("mirror");
        await running.sendFile(content);
        const [file, end] = await collected(running);
        assert.deepEqual(file.value, content);
        assert.equal(end.value, size);
      }
    });
  },

  async installs() {
    const content = new Uint8Array(Buffer.from(given.artifact, "base64"));
    await withClient({}, async (client) => {
      assert.equal(await client.checkProgram("uploaded", "0.1.0"), false);
      assert.equal(await client.install(content), "uploaded@0.1.0");
      assert.equal(await client.install(content), "uploaded@0.1.0");
      assert.equal(await client.checkProgram("uploaded", "0.1.0", content), true);
      assert.equal(await client.checkProgram("uploaded", "0.1.0", content.subarray(1)), false);
      assert.ok((await client.programs()).some((each) => each.name === "uploaded"));
      assert.equal(await client.run("uploaded@0.1.0"), given.returns);
      await client.removeProgram("uploaded", "0.1.0");
      await assert.rejects(client.launch("uploaded"), pie.NotFound);
      await assert.rejects(client.install(content.subarray(0, 1000)), pie.ProgramError);
    });
  },

  async fails() {
    await withClient({}, async (client) => {
      await assert.rejects(client.launch("nowhere"), (error) => error instanceof pie.NotFound && error.code === "not-found");
      await assert.rejects(client.run("text-completion", { promt: "x" }), pie.InvalidRequest);
      await assert.rejects(client.run("broken"), (error) => error instanceof pie.GuestError && /on purpose/.test(error.message));
      await assert.rejects(client.request("no_such_message"), pie.ProtocolError);
      const running = await client.launch("echo");
      await running.terminate();
      await assert.rejects(running.result(), pie.Cancelled);
      assert.ok((await collected(running)).at(-1).error instanceof pie.Cancelled);
      await client.ping();
    });
    await assert.rejects(pie.Client.connect("ws://127.0.0.1:1/"), pie.Disconnected);
    assert.deepEqual([...pie.errorCodes].sort(), given.codes);
  },

  async logsIn() {
    for (const apiKey of [undefined, "wrong"]) {
      await assert.rejects(pie.Client.connect(url, apiKey === undefined ? {} : { apiKey }), pie.Unauthenticated);
    }
    assert.deepEqual(await withClient({ apiKey: given.key }, (client) => client.run("echo-input", { n: 1 })), { n: 1 });
    for (const pem of given.pems) {
      const privateKey = await pie.PrivateKey.parse(pem);
      for (let round = 0; round < 8; round++) { // signatures of ECDSA differ in length
        await withClient({ privateKey }, (client) => client.ping());
      }
    }
    await assert.rejects(pie.PrivateKey.parse(given.openssh), (error) => /PKCS #8/.test(error.message));
    const stranger = await pie.PrivateKey.parse(given.stranger);
    await assert.rejects(pie.Client.connect(url, { username: "alice", privateKey: stranger }), pie.Unauthenticated);
  },

  async comesBack() {
    await withClient({}, async (client) => {
      const running = await client.launch("echo");
      const events = running[Symbol.asyncIterator]();
      assert.equal((await events.next()).value.value, "ready\n");
      sockets.at(-1).terminate();
      await assert.rejects(client.ping(), pie.Disconnected);
      await patiently(() => client.ping());
      await running.signal("again");
      assert.equal((await events.next()).value.value, "AGAIN");
      await running.closeInput();
      assert.deepEqual(await running.result(), { heard: true });
    });
    const leaving = await pie.Client.connect(url, { username: "alice", reconnect: false });
    const left = await leaving.launch("echo");
    sockets.at(-1).terminate();
    await assert.rejects(left.result(), pie.Disconnected);
    await withClient({}, async (client) => {
      const [{ id }] = (await client.processes()).filter((each) => each.id === left.id);
      const found = await client.attach(id, 0);
      await found.closeInput();
      assert.deepEqual(shown(await collected(found)), [["stdout", "ready\n"], ["return", { heard: true }]]);
    });
  },

  async attachesAndDetaches() {
    await withClient({}, async (client) => {
      const running = await client.launch("echo");
      await running.detach();
      await collected(running);
      await assert.rejects(running.result(), pie.Disconnected);
      const mine = await client.attach(running.id, 0);
      await withClient({}, async (other) => {
        const theirs = await other.attach(running.id, 0);
        await assert.rejects(collected(mine), /another client/);
        await theirs.closeInput();
        assert.deepEqual(await theirs.result(), { heard: true });
      });
      const quiet = await client.launch("echo", {}, { detached: true });
      await quiet.terminate();
    });
  },

  async asksAboutModels() {
    await withClient({}, async (client) => {
      assert.deepEqual((await client.models()).map((model) => model.name), ["first", "second"]);
      await client.unloadModel("second");
      await client.loadModel("second");
      const status = await client.query("model_status");
      assert.ok("first.kv_pages_total" in status);
      await assert.rejects(client.query("nothing"), pie.InvalidRequest);
      await client.registerMcpServer("tools", async (method) => ({ method }));
    });
  },
};

async function patiently(work) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await work();
    } catch (error) {
      if (attempt >= 100 || !(error instanceof pie.Disconnected)) {
        throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

await scenarios[scenario]();
console.log("done");
