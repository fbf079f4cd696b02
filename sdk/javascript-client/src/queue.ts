/** Items that wait for whoever takes them, in order, until an end that is told once everything is taken. */

type Waiter<T> = { resolve: (item: T) => void; reject: (error: Error) => void };

export class Queue<T> {
  readonly #items: T[] = [];
  readonly #waiters: Waiter<T>[] = [];
  #end: Error | undefined;

  put(item: T): void {
    if (this.#end !== undefined) {
      return;
    }
    const waiter = this.#waiters.shift();
    if (waiter === undefined) {
      this.#items.push(item);
    } else {
      waiter.resolve(item);
    }
  }

  /** No more items will come; `take` rejects with this after the last one. */
  fail(error: Error): void {
    this.#end ??= error;
    for (const waiter of this.#waiters.splice(0)) {
      waiter.reject(this.#end);
    }
  }

  take(): Promise<T> {
    if (this.#items.length > 0) {
      return Promise.resolve(this.#items.shift() as T);
    }
    if (this.#end !== undefined) {
      return Promise.reject(this.#end);
    }
    return new Promise((resolve, reject) => this.#waiters.push({ resolve, reject }));
  }
}
