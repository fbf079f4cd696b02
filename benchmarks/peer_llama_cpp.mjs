// llama.cpp's side of `benchmarks.peers`, through node-llama-cpp; same protocol as peer_vllm.py, one prompt at a time.
//
//     node peer_llama_cpp.mjs MODEL.gguf     (with node-llama-cpp in NODE_MODULES/node_modules)

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import readline from "node:readline";

const require = createRequire(pathToFileURL(process.env.NODE_MODULES + "/"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const threads = Number(process.env.THREADS);
const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: threads });
const model = await llama.loadModel({ modelPath: process.argv[2] });
const context = await model.createContext({ contextSize: 1024, sequences: 1, threads: { ideal: threads, min: threads } });
const sequence = context.getSequence();
console.log(JSON.stringify({ ready: true }));

for await (const line of readline.createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  await sequence.clearHistory();
  const wall = performance.now();
  const cpu = process.cpuUsage();
  const tokens = [];
  for await (const token of sequence.evaluate(request.prompts[0], { temperature: 0, yieldEogToken: true })) {
    tokens.push(token);
    if (tokens.length === request.max_tokens) break;
  }
  const used = process.cpuUsage(cpu);
  console.log(
    JSON.stringify({
      wall_s: (performance.now() - wall) / 1e3,
      cpu_s: (used.user + used.system) / 1e6,
      tokens: [tokens],
    }),
  );
}
