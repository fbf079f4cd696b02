/* Notes down calls of suspending host functions instead of serving them: see quick_calls.py.

   Only wasmtime's public C API is used, through the addresses that Python hands over. The layouts are those of
   converters.py and fibers.py; the self-test of quick_calls.py tries them before any guest runs. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MOST = 6, RESULT = 19 };

typedef struct { /* wasmtime_component_val_t: its kind, and what it holds */
  uint64_t kind, of, more[2];
} value;

typedef struct { /* wasmtime_async_continuation_t */
  bool (*callback)(void *);
  void *env;
  void (*finalizer)(void *);
} continuation;

typedef struct { /* one for each function */
  uint64_t number, count;
  uint64_t ok_kind;     /* of a result that is a number; see converters.py */
  uint64_t masks[MOST]; /* the bits of a number; 0: a borrowed handle */
} function;

typedef struct { /* one for each guest; Python sees it as an array of words */
  uint64_t flag; /* 1: the result is written */
  void *context;
  void *future;
  uint64_t called; /* which function was noted down in the last poll; 0: none */
  value *results;
  uint64_t arguments[MOST]; /* handles as the number in the guest's table; 0: not a handle of this host */
  const function *noted;    /* the function that was noted down last */
} guest;

static void *(*to_host)(void *, void *, void **);
static uint32_t (*number_of)(void *);
static void (*delete_host)(void *);
static void (*delete_error)(void *);
static bool (*poll_future)(void *);
static value *(*boxed)(value *);
static _Thread_local guest *current;

void pie_use(void *a, void *b, void *c, void *d, void *e, void *f) {
  to_host = a, number_of = b, delete_host = c, delete_error = d, poll_future = e, boxed = f;
}

bool pie_poll(guest *polled) {
  current = polled;
  polled->called = 0;
  return poll_future(polled->future);
}

/* Writes the number in arguments[0] as the ok side of the result, and goes on. */
bool pie_answer(guest *answered) {
  value number = {answered->noted->ok_kind, answered->arguments[0], {0, 0}};
  value *results = answered->results;
  results->of = 1;
  results->more[0] = (uint64_t)(uintptr_t)boxed(&number);
  results->kind = RESULT;
  answered->flag = 1;
  return pie_poll(answered);
}

static bool is_ready(void *env) { return ((guest *)env)->flag != 0; }

/* The number of a handle; that ends the borrow, which wasmtime insists on before the host function returns. */
static uint64_t borrowed(void *context, uint64_t handle) {
  void *host = NULL, *error = to_host(context, (void *)(uintptr_t)handle, &host);
  if (error != NULL) {
    delete_error(error);
    return 0;
  }
  uint64_t number = number_of(host);
  delete_host(host);
  return number;
}

void pie_note(const function *called, void *context, void *type, const value *arguments, size_t count,
              value *results, size_t result_count, void **error, continuation *then) {
  (void)context, (void)type, (void)count, (void)result_count, (void)error;
  guest *caller = current;
  then->callback = is_ready, then->env = caller, then->finalizer = NULL;
  caller->flag = 0;
  caller->results = results;
  caller->called = called->number;
  caller->noted = called;
  for (uint64_t at = 0; at < called->count; at++) {
    uint64_t mask = called->masks[at], held = arguments[at].of;
    caller->arguments[at] = mask ? held & mask : borrowed(caller->context, held);
  }
}
