// The client of fanfare, for browsers and other runtimes with a global WebSocket (Node 22, Deno, Bun):
//   const news = new Fanfare("/ws/alice", { channel: "news" });
//   news.on("message", (event) => show(event.sender, event.text));
//   news.on("gap", () => refetch());      // events may be missing: reload the state
//   const id = await news.send("hello");  // the id of the event
// It reconnects by itself and resumes from the last id. fanfare.d.ts describes options and events.

// Milliseconds. The maximum of the delay doubles with each attempt. The delay is a random part of it (full
// jitter), so that clients spread out.
const FIRST_DELAY = 1_000;
const MAX_DELAY = 30_000;
const CONNECT_TIMEOUT = 15_000; // ms from the start of an attempt to the welcome
const STEADY_AFTER = 10_000; // ms after which a connection counts as steady and the delays start again

// Answered with a ping that carries our position. (Scripts cannot see or send WebSocket pings.)
const PING = '{"type":"ping"}';

const FATAL = new Set([1002, 1003, 1007, 4003]); // retrying would fail in the same way
const MESSAGE_ERRORS = new Set([1008, 1009]); // caused by one message: incomplete for too long, or too big
const BUSY = new Set([1013, 4029]); // the server is busy, or the client sends too much

const failure = (code, message) => Object.assign(new Error(message || code), { name: "FanfareError", code });

export class Fanfare {
  #url;
  #options;
  #handlers = { message: new Set(), state: new Set(), recovered: new Set(), gap: new Set(), error: new Set() };
  #state = "connecting";
  #last = null; // the id of our position; null without one
  #head = -1; // events up to this id are older than the connection
  #socket = null; // events of other sockets are ignored
  #timer; // the only one: the deadline of an attempt, the delay before the next, or the ping interval
  #pending = new Map(); // unanswered messages: ref → the functions of the promise
  #ref = 0;
  #failures = 0; // losses since the last steady connection
  #tokenRenewed = false; // whether a fresh token has been tried since then
  #busy = false; // the server is busy, so nothing shortens the delay
  #liveSince = Infinity; // when the connection became live
  #lastFrame = 0; // when the last frame arrived
  #lastPing = -1; // when the last ping was sent
  #listening = new AbortController();

  constructor(url, { channel, lastEventId, ...options } = {}) {
    this.#url = new URL(url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    if (channel) this.#url.searchParams.set("channel", channel);
    if ((lastEventId ?? "") !== "") this.#last = Number(lastEventId);
    this.#options = { pingInterval: 30_000, pongTimeout: 10_000, ...options };
    // Events at which connections are often dead, or possible again.
    const { signal } = this.#listening;
    for (const name of ["online", "offline", "pageshow", "visibilitychange"])
      globalThis.addEventListener?.(name, () => this.#onWake(), { signal });
    queueMicrotask(() => this.#state === "connecting" && this.#open()); // handlers added meanwhile get all events
  }

  get state() { return this.#state; }
  get lastEventId() { return this.#last; }
  on(name, handler) {
    this.#handlers[name].add(handler);
    return () => this.#handlers[name].delete(handler);
  }

  send(message) {
    return new Promise((resolve, reject) => {
      if (this.#state !== "live") return reject(failure("offline", "not sent, there is no connection"));
      const frame = { ...(typeof message === "string" ? { text: message } : message), ref: ++this.#ref };
      this.#socket.send(JSON.stringify(frame));
      this.#pending.set(frame.ref, { resolve, reject });
    });
  }

  close() { this.#end(1000, "closed by the page"); }

  async #open() {
    this.#setState("connecting");
    if (this.#state !== "connecting") return; // a handler has closed it
    const attempt = (this.#socket = {}); // stands for the socket while the token is fetched
    this.#setTimer(CONNECT_TIMEOUT, () => this.#onLost(1006, "no welcome in time"));
    try {
      const url = new URL(this.#url);
      url.searchParams.set("lastEventId", this.#last ?? "");
      let { token } = this.#options;
      if (typeof token === "function") token = await token();
      if (this.#socket !== attempt) return; // closed or timed out meanwhile
      if (token) url.searchParams.set("token", token);
      const socket = (this.#socket = new WebSocket(url, "fanfare.v1"));
      socket.onmessage = ({ data }) => socket === this.#socket && this.#onData(data);
      socket.onclose = ({ code, reason }) => socket === this.#socket && this.#onLost(code, reason);
    } catch (error) {
      if (this.#socket !== attempt) return;
      this.#onLost(1006, "the connection could not be opened");
      this.#emit("error", error);
    }
  }

  #onData(data) {
    this.#lastFrame = performance.now();
    let frame = null;
    try { frame = JSON.parse(data); } catch {}
    if (typeof frame === "object" && frame !== null && !Array.isArray(frame)) return this.#onFrame(frame);
    // Not from a server of this version. An event ends with its id: skip it, or every resume would repeat it.
    const [, id = 0] = /"id":(\d{1,16})}$/.exec(String(data).slice(-22)) ?? [];
    const live = this.#state === "live";
    if (live) this.#last = Math.max(this.#last, id);
    this.#emit("error", failure("unreadable", "the server sent a frame that is not a JSON object"));
    if (live) this.#emit("gap", { lastEventId: this.#last, from: "unreadable" });
  }

  #onFrame(frame) {
    if (typeof frame.id === "number" && frame.type !== "ack") {
      if (frame.id <= this.#last) return; // a duplicate
      this.#last = frame.id;
      return this.#emit("message", frame, { recovered: frame.id <= this.#head });
    }
    switch (frame.type) {
      case "welcome": return this.#onWelcome(frame);
      case "ack": return this.#takePending(frame)?.resolve(frame.id);
      case "ping": return (this.#last = Math.max(this.#last, frame.lastEventId ?? 0));
      case "reset":
        this.#last = frame.lastEventId;
        return this.#emit("gap", { lastEventId: this.#last, from: "reset" });
      case "error": {
        const error = failure(frame.code, frame.message);
        const sent = this.#takePending(frame);
        return sent ? sent.reject(error) : this.#emit("error", error);
      }
      default: this.#emit("message", frame, { recovered: false }); // a plain PUBLISH has no id
    }
  }

  #takePending({ ref }) {
    const sent = this.#pending.get(ref);
    this.#pending.delete(ref);
    return sent;
  }

  #onWelcome({ lastEventId, head, recovered }) {
    const resumed = this.#last !== null;
    this.#last = recovered ? Math.max(this.#last, lastEventId) : lastEventId; // only moves back with a gap
    this.#head = head;
    this.#liveSince = performance.now();
    this.#schedulePing();
    this.#setState("live");
    if (!recovered) this.#emit("gap", { lastEventId, from: "welcome" });
    else if (resumed) this.#emit("recovered", { lastEventId, head });
  }

  // Sends a ping after pingInterval without a frame. Without an answer the connection is dead, whatever its state.
  #schedulePing() {
    const delay = this.#lastFrame + this.#options.pingInterval - performance.now();
    if (delay > 0) this.#setTimer(delay, () => this.#schedulePing());
    else this.#ping();
  }

  #ping() {
    if (this.#lastPing > this.#lastFrame) return; // one is unanswered
    this.#lastPing = performance.now();
    this.#socket.send(PING);
    this.#setTimer(this.#options.pongTimeout, () =>
      this.#lastFrame >= this.#lastPing ? this.#schedulePing() : this.#onLost(1006, "no answer to a ping"));
  }

  #onWake() {
    if (this.#state === "live") this.#ping();
    else if (this.#state === "waiting" && !this.#busy) this.#open();
  }

  #onLost(code, reason) {
    const steady = performance.now() - this.#liveSince > STEADY_AFTER;
    const renewable = typeof this.#options.token === "function" && (steady || !this.#tokenRenewed);
    if (FATAL.has(code) || (code === 4001 && !renewable)) return this.#end(code, reason);
    this.#drop();
    this.#tokenRenewed = code === 4001 || (this.#tokenRenewed && !steady);
    this.#busy = BUSY.has(code);
    this.#failures = steady ? 1 : this.#failures + 1;
    let ceiling = Math.min(MAX_DELAY, FIRST_DELAY * 2 ** (this.#failures - 1));
    if (code === 1012) ceiling = 2 * FIRST_DELAY; // the node is stopping: reconnect soon, but not all at once
    const delay = this.#busy ? 5_000 + Math.random() * (MAX_DELAY - 5_000) : Math.random() * ceiling;
    this.#setTimer(delay, () => this.#open());
    this.#setState("waiting", { delay, code, reason });
    if (MESSAGE_ERRORS.has(code)) this.#emit("error", failure(code, reason || "a message was not accepted"));
  }

  #end(code, reason) {
    if (this.#state === "closed") return;
    this.#listening.abort();
    this.#drop();
    this.#setState("closed", { code, reason });
    if (code !== 1000) this.#emit("error", failure(code, reason || `closed with ${code}`));
  }

  // Drops the socket without waiting for its close event, which takes long on a dead connection.
  #drop() {
    clearTimeout(this.#timer);
    this.#socket?.close?.(1000);
    this.#socket = null;
    this.#liveSince = Infinity;
    for (const { reject } of this.#pending.values())
      reject(failure("unknown", "the connection was lost: the message may or may not have been published"));
    this.#pending.clear();
  }

  #setTimer(delay, action) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(action, delay);
  }

  #setState(state, detail) {
    this.#state = state;
    this.#emit("state", { state, ...detail });
  }

  // Errors of handlers are reported like any uncaught error.
  #emit(name, ...values) {
    for (const handler of [...this.#handlers[name]]) {
      try { handler(...values); } catch (error) { queueMicrotask(() => { throw error; }); }
    }
  }
}
