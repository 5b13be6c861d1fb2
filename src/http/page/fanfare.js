// The client of fanfare, for browsers and whatever else has a global WebSocket (Node 22, Deno, Bun):
//   const news = new Fanfare("/ws/alice", { channel: "news" });
//   news.on("message", (event) => show(event.sender, event.text));
//   news.on("gap", () => refetch());      // something may be missing: load the state anew
//   const id = await news.send("hello");  // the id that the event got
// After any loss it comes back by itself, from the last id it saw. fanfare.d.ts explains options and events.

const FIRST = 1_000; // ms; the ceiling of the first delay. It doubles with each attempt up to LONGEST, and
const LONGEST = 30_000; // a delay is any part of it (full jitter), so that many clients don't come at once.
const OPENING = 15_000; // ms from an attempt's start to the server's welcome
const STEADY = 10_000; // ms that a connection must have lived for the next loss to count as a first one

// Answered with a ping that carries our position. (Scripts neither see nor send WebSocket pings.)
const PROBE = '{"type":"ping"}';

const FATAL = new Set([1002, 1003, 1007, 4003]); // after these, trying again repeats the mistake
const BLAMED = new Set([1008, 1009]); // one message took too long on its way, or is too long: not the connection's fault
const BUSY = new Set([1013, 4029]); // the server wants fewer attempts, or fewer messages

const failure = (code, message) => Object.assign(new Error(message || code), { name: "FanfareError", code });

export class Fanfare {
  #url;
  #options;
  #handlers = { message: new Set(), state: new Set(), recovered: new Set(), gap: new Set(), error: new Set() };
  #state = "connecting";
  #last = null; // our position's id; null as long as there is none
  #head = -1; // ids up to this one are older than the connection
  #socket = null; // what comes from any other is ignored
  #timer; // the only one: an attempt's deadline, the delay before the next, or the watch over pingInterval
  #pending = new Map(); // sent and not answered: ref → the promise's functions
  #ref = 0;
  #failures = 0; // losses since the last steady connection
  #renewed = false; // whether a fresh token has been tried since then
  #busy = false; // the server asked for time, so nothing shortens the delay
  #since = Infinity; // when the connection became live
  #heard = 0; // when the last frame came
  #asked = -1; // when the last probe left
  #listening = new AbortController();

  constructor(url, { channel, lastEventId, ...options } = {}) {
    this.#url = new URL(url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    if (channel) this.#url.searchParams.set("channel", channel);
    if ((lastEventId ?? "") !== "") this.#last = Number(lastEventId);
    this.#options = { pingInterval: 30_000, pongTimeout: 10_000, ...options };
    // Moments when a connection is often found dead, or can be had again.
    const { signal } = this.#listening;
    for (const name of ["online", "offline", "pageshow", "visibilitychange"])
      globalThis.addEventListener?.(name, () => this.#wake(), { signal });
    queueMicrotask(() => this.#state === "connecting" && this.#open()); // handlers added meanwhile hear all
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
    this.#change("connecting");
    if (this.#state !== "connecting") return; // a handler has closed it
    const attempt = (this.#socket = {}); // holds the socket's place while the token is fetched
    this.#after(OPENING, () => this.#lost(1006, "no welcome in time"));
    try {
      const url = new URL(this.#url);
      url.searchParams.set("lastEventId", this.#last ?? "");
      let { token } = this.#options;
      if (typeof token === "function") token = await token();
      if (this.#socket !== attempt) return; // closed or given up meanwhile
      if (token) url.searchParams.set("token", token);
      const socket = (this.#socket = new WebSocket(url, "fanfare.v1"));
      socket.onmessage = ({ data }) => socket === this.#socket && this.#receive(data);
      socket.onclose = ({ code, reason }) => socket === this.#socket && this.#lost(code, reason);
    } catch (error) {
      if (this.#socket !== attempt) return;
      this.#lost(1006, "no attempt could be made");
      this.#emit("error", error);
    }
  }

  #receive(data) {
    this.#heard = performance.now();
    let frame = null;
    try { frame = JSON.parse(data); } catch {}
    if (typeof frame === "object" && frame !== null && !Array.isArray(frame)) return this.#frame(frame);
    // Not from a server of this version. An event ends with its id: skip it, or each resume would bring it again.
    const [, id = 0] = /"id":(\d{1,16})}$/.exec(String(data).slice(-22)) ?? [];
    const live = this.#state === "live";
    if (live) this.#last = Math.max(this.#last, id);
    this.#emit("error", failure("unreadable", "the server sent a frame that is no JSON object"));
    if (live) this.#emit("gap", { lastEventId: this.#last, from: "unreadable" });
  }

  #frame(frame) {
    if (typeof frame.id === "number" && frame.type !== "ack") {
      if (frame.id <= this.#last) return; // had it already
      this.#last = frame.id;
      return this.#emit("message", frame, { recovered: frame.id <= this.#head });
    }
    switch (frame.type) {
      case "welcome": return this.#welcome(frame);
      case "ack": return this.#answered(frame)?.resolve(frame.id);
      case "ping": return (this.#last = Math.max(this.#last, frame.lastEventId ?? 0));
      case "reset":
        this.#last = frame.lastEventId;
        return this.#emit("gap", { lastEventId: this.#last, from: "reset" });
      case "error": {
        const error = failure(frame.code, frame.message);
        const sent = this.#answered(frame);
        return sent ? sent.reject(error) : this.#emit("error", error);
      }
      default: this.#emit("message", frame, { recovered: false }); // from the bare channel: without id
    }
  }

  #answered({ ref }) {
    const sent = this.#pending.get(ref);
    this.#pending.delete(ref);
    return sent;
  }

  #welcome({ lastEventId, head, recovered }) {
    const resumed = this.#last !== null;
    this.#last = recovered ? Math.max(this.#last, lastEventId) : lastEventId; // back only with a gap
    this.#head = head;
    this.#since = performance.now();
    this.#watch();
    this.#change("live");
    if (!recovered) this.#emit("gap", { lastEventId, from: "welcome" });
    else if (resumed) this.#emit("recovered", { lastEventId, head });
  }

  // After some pingInterval asks for a sign of life. Without one the connection is dead, whatever the system says.
  #watch() {
    const rest = this.#heard + this.#options.pingInterval - performance.now();
    if (rest > 0) this.#after(rest, () => this.#watch());
    else this.#probe();
  }

  #probe() {
    if (this.#asked > this.#heard) return; // asked already
    this.#asked = performance.now();
    this.#socket.send(PROBE);
    this.#after(this.#options.pongTimeout, () =>
      this.#heard >= this.#asked ? this.#watch() : this.#lost(1006, "no sign of life"));
  }

  #wake() {
    if (this.#state === "live") this.#probe();
    else if (this.#state === "waiting" && !this.#busy) this.#open();
  }

  #lost(code, reason) {
    const steady = performance.now() - this.#since > STEADY;
    const renewable = typeof this.#options.token === "function" && (steady || !this.#renewed);
    if (FATAL.has(code) || (code === 4001 && !renewable)) return this.#end(code, reason);
    this.#drop();
    this.#renewed = code === 4001 || (this.#renewed && !steady);
    this.#busy = BUSY.has(code);
    this.#failures = steady ? 1 : this.#failures + 1;
    let ceiling = Math.min(LONGEST, FIRST * 2 ** (this.#failures - 1));
    if (code === 1012) ceiling = 2 * FIRST; // the node stops and another is there, so soon, but not all at once
    const delay = this.#busy ? 5_000 + Math.random() * (LONGEST - 5_000) : Math.random() * ceiling;
    this.#after(delay, () => this.#open());
    this.#change("waiting", { delay, code, reason });
    if (BLAMED.has(code)) this.#emit("error", failure(code, reason || "a message was not taken"));
  }

  #end(code, reason) {
    if (this.#state === "closed") return;
    this.#listening.abort();
    this.#drop();
    this.#change("closed", { code, reason });
    if (code !== 1000) this.#emit("error", failure(code, reason || `closed for good with ${code}`));
  }

  // Forgets the socket without waiting for its close event, which a dead one keeps back for long.
  #drop() {
    clearTimeout(this.#timer);
    this.#socket?.close?.(1000);
    this.#socket = null;
    this.#since = Infinity;
    for (const { reject } of this.#pending.values())
      reject(failure("unknown", "the connection was lost: the message may or may not have been published"));
    this.#pending.clear();
  }

  #after(delay, action) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(action, delay);
  }

  #change(state, detail) {
    this.#state = state;
    this.#emit("state", { state, ...detail });
  }

  // A handler's own trouble is reported like any uncaught error, and stops nothing here.
  #emit(name, ...values) {
    for (const handler of [...this.#handlers[name]]) {
      try { handler(...values); } catch (error) { queueMicrotask(() => { throw error; }); }
    }
  }
}
