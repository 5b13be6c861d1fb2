// The client of fanfare, for browsers, Node, Deno and Bun:
//   const news = new Fanfare("/ws/alice", { channel: "news" });
//   news.on("message", (event) => show(event.sender, event.text));
//   news.on("gap", () => refetch());      // events may be missing: reload the state
//   const id = await news.send("hello");  // the id of the event
//   news.on("error", (error) => report(error.code, error.message));
// It reconnects by itself and resumes from the last id. fanfare.d.ts describes options and events.

// Milliseconds. The maximum of the delay doubles with each attempt. The delay is a random part of it (full
// jitter), so that clients spread out.
const FIRST_DELAY = 1_000;
const MAX_DELAY = 30_000;
const CONNECT_TIMEOUT = 15_000; // ms from the start of an attempt to the welcome
const STEADY_AFTER = 10_000; // ms after which a connection counts as steady and the delays start again

// Answered with a ping that carries our position. (Scripts cannot see or send WebSocket pings.)
const PING = '{"type":"ping"}';

// Messages that wait for the first connection. With its default limits a node accepts more than this at once.
const MAX_WAITING = 64;
const MAX_WAITING_LENGTH = 256 * 1024; // UTF-16 code units

const ATTEMPTS = 3; // attempts in a row that fail before an error, tokens in a row that are rejected before the end
const CHECK = "check the URL, that the server runs and allows this origin, and the token";
const MAX_WARNINGS = 100; // different texts on the console

const FINAL = new Set([1002, 1003, 1007, 4003, 4400, 4403]); // retrying would fail in the same way
const TOKEN_REJECTED = new Set([4001, 4401]);
const TOO_BIG = 1009;
const MESSAGE_ERRORS = new Set([1008, TOO_BIG]); // caused by one message: incomplete for too long, or too big
const BUSY = new Set([1013, 4029]); // the server is busy, or the client sends too much

const failure = (code, message) => Object.assign(new Error(message || code), { name: "FanfareError", code });

export class Fanfare {
  #url;
  #options;
  #WebSocket;
  #handlers = { message: new Set(), state: new Set(), recovered: new Set(), gap: new Set(), error: new Set() };
  #state = "connecting";
  #last = null; // the id of our position; null without one
  #head = -1; // events up to this id are older than the connection
  #socket = null; // events of other sockets are ignored
  #joined = false; // whether there has been a connection
  #timer; // of the connection: the deadline of an attempt, the delay before the next, or the ping interval
  #gap = null; // a gap that will be emitted: its timer, where it was noticed, our position before it
  #pending = new Map(); // unanswered messages, unsent before the first connection: ref → text and promise
  #ref = 0;
  #failures = 0; // losses since the last steady connection
  #rejectedTokens = 0; // since then
  #attempts = 0; // failed since the last connection
  #busy = false; // the server is busy, so nothing shortens the delay
  #liveSince = Infinity; // when the connection became live
  #lastFrame = 0; // when the last frame arrived
  #lastPing = -1; // when the last ping was sent
  #listening = new AbortController();
  #warnings = new Set();

  constructor(url, {
    channel, history, lastEventId, token, WebSocket = globalThis.WebSocket,
    pingInterval = 30_000, pongTimeout = 10_000, gapDelay = 3_000,
  } = {}) {
    if (typeof WebSocket !== "function") throw new TypeError(
      "no global WebSocket: set the option WebSocket, for example to that of the package ws, or use Node 22");
    this.#WebSocket = WebSocket;
    this.#url = new URL(url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    if (channel) this.#url.searchParams.set("channel", channel);
    if (history) this.#url.searchParams.set("history", history); // without an effect where lastEventId has a value
    if ((lastEventId ?? "") !== "") this.#last = Number(lastEventId);
    this.#options = { token, pingInterval, pongTimeout, gapDelay };
    // Events at which connections are often dead, or possible again.
    const { signal } = this.#listening;
    for (const name of ["online", "offline", "pageshow", "visibilitychange"])
      globalThis.addEventListener?.(name, () => this.#onWake(), { signal });
    queueMicrotask(() => this.#state === "connecting" && this.#open()); // handlers added meanwhile get all events
  }

  get state() { return this.#state; }
  get lastEventId() { return this.#gap ? this.#gap.position : this.#last; } // to resume from it repeats the gap
  on(name, handler) {
    this.#handlers[name].add(handler);
    return () => this.#handlers[name].delete(handler);
  }

  send(message) {
    return new Promise((resolve, reject) => {
      const ref = ++this.#ref;
      const text = JSON.stringify({ ...(typeof message === "string" ? { text: message } : message), ref });
      const open = this.#state === "live" && !(this.#socket.readyState > 1); // a closing socket sends nothing
      if (this.#joined ? !open : this.#state === "closed")
        return reject(failure("offline", "not sent, there is no connection"));
      if (!this.#joined && !this.#mayWait(text))
        return reject(failure("offline", "not sent, too many messages wait for the first connection"));
      if (open) this.#socket.send(text);
      this.#pending.set(ref, { text, resolve, reject });
    });
  }

  close() { this.#end(1000, "closed by the page"); }

  #mayWait(message) {
    let { length } = message;
    for (const { text } of this.#pending.values()) length += text.length;
    return this.#pending.size < MAX_WAITING && length <= MAX_WAITING_LENGTH;
  }

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
      const socket = (this.#socket = new this.#WebSocket(url.href, "fanfare.v1"));
      socket.onmessage = ({ data }) => socket === this.#socket && this.#onData(data);
      socket.onclose = ({ code, reason }) => socket === this.#socket && this.#onLost(code, reason);
      // Node 22 emits no close after an error before the connection is open.
      socket.onerror = ({ message = "" }) =>
        socket === this.#socket && this.#state === "connecting" && this.#onLost(1006, message);
    } catch (error) {
      if (this.#socket === attempt) this.#onLost(1006, "the connection could not be opened", error);
    }
  }

  #onData(data) {
    this.#lastFrame = performance.now();
    let frame = null;
    try { frame = JSON.parse(data); } catch {}
    if (typeof frame === "object" && frame !== null && !Array.isArray(frame)) return this.#onFrame(frame);
    // Not from a server of this version. An event ends with its id: skip it, or every resume would repeat it.
    const [, id = 0] = /"id":(\d{1,16})}$/.exec(String(data).slice(-22)) ?? [];
    this.#emit("error", failure("unreadable", "the server sent a frame that is not a JSON object"));
    if (this.#state === "live") this.#skipTo(Math.max(this.#last, id), "unreadable");
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
      case "reset": return this.#skipTo(frame.lastEventId, "reset");
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
    this.#joined = true;
    this.#attempts = 0;
    this.#head = head;
    this.#liveSince = performance.now();
    this.#schedulePing();
    for (const { text } of this.#pending.values()) this.#socket.send(text); // they wait only for the first connection
    if (recovered) this.#last = Math.max(this.#last, lastEventId); // only moves back with a gap
    this.#setState("live");
    if (this.#state !== "live") return; // a handler has closed it
    if (!recovered) this.#skipTo(lastEventId, "welcome");
    else if (resumed) this.#emit("recovered", { lastEventId, head });
  }

  // A gap often concerns all clients: a random delay keeps them from reloading their state in one instant.
  #skipTo(lastEventId, from) {
    const delay = Math.random() * this.#options.gapDelay;
    const isDelayed = delay > 0; // NaN is no delay
    this.#gap ??= { position: this.#last, timer: isDelayed && setTimeout(() => this.#emitGap(), delay) };
    this.#gap.from = from;
    this.#last = lastEventId;
    if (!isDelayed) this.#emitGap(); // before any later event
  }

  #emitGap() {
    const { timer, from } = this.#gap;
    clearTimeout(timer);
    this.#gap = null;
    this.#emit("gap", { lastEventId: this.#last, from });
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

  #onLost(code, reason, cause) {
    const steady = performance.now() - this.#liveSince > STEADY_AFTER;
    this.#rejectedTokens = (steady ? 0 : this.#rejectedTokens) + TOKEN_REJECTED.has(code);
    const renewable = typeof this.#options.token === "function" && this.#rejectedTokens < ATTEMPTS;
    if (FINAL.has(code) || (TOKEN_REJECTED.has(code) && !renewable)) return this.#end(code, reason);
    const wasLive = this.#state === "live";
    if (!wasLive && cause === undefined) this.#attempts++;
    this.#drop();
    if (this.#joined) this.#rejectPending(code, "the connection was lost");
    this.#busy = BUSY.has(code);
    this.#failures = steady ? 1 : this.#failures + 1;
    let ceiling = Math.min(MAX_DELAY, FIRST_DELAY * 2 ** (this.#failures - 1));
    if (code === 1012) ceiling = 2 * FIRST_DELAY; // the node is stopping: reconnect soon, but not all at once
    const delay = this.#busy ? 5_000 + Math.random() * (MAX_DELAY - 5_000) : Math.random() * ceiling;
    this.#setTimer(delay, () => this.#open());
    this.#setState("waiting", { delay, code, reason });
    if (cause !== undefined) this.#emit("error", cause);
    else if (wasLive && MESSAGE_ERRORS.has(code))
      this.#emit("error", failure(code, reason || "a message was not accepted"));
    else if (this.#attempts === ATTEMPTS) this.#emit("error", failure("unreachable",
      `no connection after ${ATTEMPTS} attempts (${reason ? `${code}, ${reason}` : code}): ${CHECK}`));
  }

  #end(code, reason) {
    if (this.#state === "closed") return;
    this.#listening.abort();
    clearTimeout(this.#gap?.timer);
    this.#drop();
    this.#rejectPending(code, reason || `closed with ${code}`);
    this.#setState("closed", { code, reason });
    if (code !== 1000) this.#emit("error", failure(code, reason || `closed with ${code}`));
  }

  // Drops the socket without waiting for its close event, which takes long on a dead connection.
  #drop() {
    const socket = this.#socket;
    clearTimeout(this.#timer);
    this.#socket = null; // first, since close() may emit an error at once
    this.#liveSince = Infinity;
    socket?.close?.(1000);
  }

  // The server reads messages in order and stops at the first that is too big. The largest is that one or comes
  // after it.
  #rejectPending(code, reason) {
    const sent = [...this.#pending.values()];
    this.#pending.clear();
    let tooBig = Infinity;
    if (code === TOO_BIG) {
      const sizes = sent.map(({ text }) => new TextEncoder().encode(text).length);
      tooBig = sizes.indexOf(sizes.reduce((a, b) => Math.max(a, b), 0));
    }
    sent.forEach(({ reject }, at) => {
      if (at === tooBig) reject(failure("too_big", "not published, the message is too big"));
      else if (at > tooBig || !this.#joined) reject(failure("offline", `not published: ${reason}`));
      else reject(failure("unknown", `the message may or may not have been published: ${reason}`));
    });
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
    if (name === "error" && this.#handlers.error.size === 0) this.#warn(...values);
    for (const handler of [...this.#handlers[name]]) {
      try { handler(...values); } catch (error) { queueMicrotask(() => { throw error; }); }
    }
  }

  // Without a handler errors go to the console, each text once.
  #warn(error) {
    const text = `fanfare: ${error?.message ?? error}${error?.code ? ` (${error.code})` : ""}`;
    if (this.#warnings.has(text) || this.#warnings.size === MAX_WARNINGS) return;
    this.#warnings.add(text);
    console.warn(text);
  }
}
