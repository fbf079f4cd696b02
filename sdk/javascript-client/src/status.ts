/** How a server does: what `read_status` answers. The fields are described in docs/protocol.md. */

/** `counts[i]` values were at most `bounds[i]` and above the bound before; the last count has no bound. */
export type Distribution = { bounds: number[]; counts: number[]; total: number };

export type GroupStatus = { name: string; total: number; used: number; cached: number; swapped: number; swap_total: number };

export type EngineStatus = {
  contexts: number;
  waiting: number;
  running: number;
  groups: GroupStatus[];
  steps: number;
  passes: number;
  shared_rows: number;
  cohort_rows: number;
  tokens: number;
  sampled_tokens: number;
  schedule_s: number;
  driver_s: number;
  deliver_s: number;
  run_ahead_hits: number;
  run_ahead_misses: number;
  run_ahead_drops: number;
  prefix_lookup_tokens: number;
  prefix_hit_tokens: number;
  suspensions: number;
  replayed_tokens: number;
  swaps: number;
  swap_failures: number;
  swapped_out_bytes: number;
  swapped_in_bytes: number;
  failed_passes: number;
  timeouts: number;
  batch_sizes: Distribution;
  step_seconds: Distribution;
  first_token_seconds: Distribution;
  between_tokens_seconds: Distribution;
  pass_wait_seconds: Distribution;
};

export type ReplicaStatus = {
  state: "ready" | "restarting";
  restarts: number;
  pid: number | null;
  cpu_s: number | null;
  resident_bytes: number | null;
  engine: EngineStatus | null;
};

export type ModelStatus = {
  name: string;
  state: "unloaded" | "loading" | "loaded" | "restarting" | "failed";
  error: string | null;
  driver: string | null;
  architecture: string | null;
  load_s: number | null;
  replicas: ReplicaStatus[];
};

export type WorkerStatus = {
  pid: number;
  processes: number;
  resumes: number | null;
  host_calls: number | null;
  cpu_s: number | null;
  resident_bytes: number | null;
};

export type ProcessStatus = {
  id: string;
  username: string;
  program: string;
  elapsed_s: number;
  waits_for: "model" | "input" | "output" | "itself";
  attached: boolean;
  contexts: number;
  pages: number;
  open_requests: number;
  tokens: number;
  trace_id: string | null;
};

export type PluginStatus = { name: string; distribution: string; version: string; load_s: number };

export type ServerStatus = {
  version: string;
  state: "loading" | "ready" | "stopping";
  uptime_s: number;
  loop_lag_s: number;
  connections: number;
  launched: number;
  running: number;
  ended: Record<string, number>;
  worker_restarts: number;
  models: ModelStatus[];
  workers: WorkerStatus[];
  plugins: PluginStatus[];
  processes: ProcessStatus[];
};
