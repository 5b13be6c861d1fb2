// The client of fanfare, for browsers, Node, Deno and Bun:
//   const news = new Fanfare("/ws/alice", { channel: "news" });
//   news.on("message", (event) => show(event.sender, event.text));
//   news.on("gap", () => refetch());      // events may be missing: reload the state
//   const id = await news.send("hello");  // the id of the event
//   news.on("error", (error) => report(error.code, error.message));
//   const room = news.subscribe("room.1"); // one more channel, with its own on, send, lastEventId and close
// It reconnects by itself and resumes from the last ids. fanfare.d.ts describes options and events.

// Milliseconds. The maximum of the delay doubles with each attempt. The delay is a random part of it (full
// jitter), so that clients spread out.
const FIRST_DELAY = 1_000;
const MAX_DELAY = 30_000;
const CONNECT_TIMEOUT = 15_000; // ms from the start of an attempt to the welcome
const STEADY_AFTER = 10_000; // ms after which a connection counts as steady and the delays start again

// Answered with a ping that carries our positions. (Scripts cannot see or send WebSocket pings.)
const PING = '{"type":"ping"}';

// Messages that wait for the first connection. With its default limits a node accepts more than this at once.
const MAX_WAITING = 64;
const MAX_WAITING_LENGTH = 256 * 1024; // UTF-16 code units

const MAX_CHANNELS = 100; // in one subscribe frame
const DEFAULT_CHANNEL = "ws_broadcast"; // of a URL without a channel

const ATTEMPTS = 3; // attempts in a row that fail before an error, tokens in a row that are rejected before the end
const CHECK = "check the URL, that the server runs and allows this origin, and the token";
const MAX_WARNINGS = 100; // different texts on the console

const FINAL = new Set([
  1002, 1003, 1007, 4003, 4400, 4403, // retrying would fail in the same way
  4010, // a backend has disconnected the user
]);
const UNSUBSCRIBED = { forbidden: "no longer allowed", disconnected: "disconnected by the application" };
const TOKEN_REJECTED = new Set([4001, 4401]);
const TOO_BIG = 1009;
const MESSAGE_ERRORS = new Set([1008, TOO_BIG]); // caused by one message: incomplete for too long, or too big
const BUSY = new Set([1013, 4029]); // the server is busy, or the client sends too much
const TEMPORARY = new Set(["unavailable", "rate_limited"]); // a subscribe is repeated

const failure = (code, message) => Object.assign(new Error(message || code), { name: "FanfareError", code });

const maxDelay = (failures) => Math.min(MAX_DELAY, FIRST_DELAY * 2 ** (failures - 1));

const warnings = new Set();

// Without a handler errors go to the console, each text once.
function warn(error, channel) {
  const source = channel === undefined ? "fanfare" : `fanfare, ${channel}`;
  const text = `${source}: ${error?.message ?? error}${error?.code ? ` (${error.code})` : ""}`;
  if (warnings.has(text) || warnings.size === MAX_WARNINGS) return;
  warnings.add(text);
  console.warn(text);
}

// The state of a channel and our position in it. The default channel has one, and each subscription.
class Cursor {
  channel; // undefined for the default channel
  history;
  presence; // whether to ask who is in the channel
  state = "connecting";
  joined = false; // whether it has been live
  position = null; // the last id; null without one
  ref = null; // of the request that the server has not answered
  followed = false; // the server sends frames of the channel, or may soon
  failures = 0; // refusals in a row
  #gapDelay;
  #head = -1; // events up to this id are older than the connection
  #gap = null; // a gap that will be emitted: its timer, where it was noticed, our position before it
  #users = null; // the names of those in the channel; null if they are unknown
  #handlers = {
    message: new Set(), state: new Set(), recovered: new Set(), gap: new Set(), presence: new Set(), error: new Set(),
  };

  constructor({ channel, lastEventId, history, presence, gapDelay }) {
    this.channel = channel;
    this.history = history;
    this.presence = presence ? true : undefined;
    this.#gapDelay = gapDelay;
    if ((lastEventId ?? "") === "") return;
    const id = Number(lastEventId);
    this.position = Number.isSafeInteger(id) && id >= 0 ? id : 0; // no channel has this id: a gap
  }

  get lastEventId() { return this.#gap ? this.#gap.position : this.position; } // to resume from it repeats the gap

  on(name, handler) {
    this.#handlers[name].add(handler);
    return () => this.#handlers[name].delete(handler);
  }

  // Errors of handlers are reported like any uncaught error.
  emit(name, ...values) {
    const handlers = [...this.#handlers[name]];
    if (name === "error" && handlers.length === 0) warn(values[0], this.channel);
    for (const handler of handlers) {
      try { handler(...values); } catch (error) { queueMicrotask(() => { throw error; }); }
    }
  }

  setState(state, detail) {
    this.state = state;
    this.emit("state", { state, ...detail });
  }

  onWelcome({ lastEventId, head, recovered }) {
    const resumed = this.position !== null;
    this.#head = head;
    if (recovered) this.moveTo(lastEventId); // only moves back with a gap
    this.setState("live");
    if (this.state !== "live" || lastEventId === undefined) return; // closed by a handler; no default channel
    if (!recovered) this.skipTo(lastEventId, "welcome");
    else if (resumed) this.emit("recovered", { lastEventId, head });
  }

  onEvent(event) {
    if (this.state !== "live") return; // of an earlier subscription
    let recovered = false; // a plain PUBLISH has no id
    if (typeof event.id === "number") {
      if (event.id <= this.position) return; // a duplicate
      this.position = event.id;
      recovered = event.id <= this.#head;
    }
    this.emit("message", event, { recovered });
  }

  // Everybody, or what has changed since, or only their number. After a reconnect everybody comes again.
  onPresence({ users, join, leave, count }) {
    const before = this.#users;
    if (this.state !== "live" || (join && !before)) return; // of an earlier subscription
    const after = users || join ? new Set(users ?? before) : null;
    for (const user of join ?? []) after.add(user);
    for (const user of leave ?? []) after.delete(user);
    this.#users = after;
    const without = (all, others) => (before && after ? [...all].filter((user) => !others.has(user)) : []);
    this.emit("presence",
      { users: after && [...after], count, joined: without(after, before), left: without(before, after) });
  }

  moveTo(id) { this.position = Math.max(this.position, id); }

  // A gap often concerns all clients: a random delay keeps them from reloading their state in one instant.
  skipTo(lastEventId, from) {
    const delay = Math.random() * this.#gapDelay;
    const isDelayed = delay > 0; // NaN is no delay
    this.#gap ??= { position: this.position, timer: isDelayed && setTimeout(() => this.#emitGap(), delay) };
    this.#gap.from = from;
    this.position = lastEventId;
    if (!isDelayed) this.#emitGap(); // before any later event
  }

  #emitGap() {
    const { timer, from } = this.#gap;
    clearTimeout(timer);
    this.#gap = null;
    this.emit("gap", { lastEventId: this.position, from });
  }

  end(code, reason) {
    clearTimeout(this.#gap?.timer);
    this.setState("closed", { code, reason });
  }
}

export class Fanfare {
  #url;
  #options;
  #WebSocket;
  #default; // the cursor of the default channel, whose state is that of the connection
  #subscriptions = new Map(); // channel → cursor; closed ones until the server has confirmed it
  #socket = null; // events of other sockets are ignored
  #timer; // of the connection: the deadline of an attempt, the delay before the next, or the ping interval
  #tokenTimer;
  #attemptToken; // the option `token` when the attempt began
  #retry = null; // the timer that repeats refused requests, and when it fires
  #pending = new Map(); // unanswered messages, and unsent ones: ref → text, cursor, whether it is sent, and promise
  #ref = 0;
  #failures = 0; // losses since the last steady connection
  #rejectedTokens = 0; // since then
  #attempts = 0; // failed since the last connection
  #busy = false; // the server is busy, so nothing shortens the delay
  #liveSince = Infinity; // when the connection became live
  #lastFrame = 0; // when the last frame arrived
  #lastPing = -1; // when the last ping was sent
  #listening = new AbortController();

  constructor(url, {
    channel, history, presence, lastEventId, token, WebSocket = globalThis.WebSocket,
    pingInterval = 30_000, pongTimeout = 10_000, gapDelay = 3_000,
  } = {}) {
    if (typeof WebSocket !== "function") throw new TypeError(
      "no global WebSocket: set the option WebSocket, for example to that of the package ws, or use Node 22");
    this.#WebSocket = WebSocket;
    this.#url = new URL(url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    if (channel !== undefined) this.#url.searchParams.set("channel", channel ?? ""); // empty: no default channel
    if (history) this.#url.searchParams.set("history", history); // without an effect where lastEventId has a value
    if (presence) this.#url.searchParams.set("presence", 1);
    this.#options = { token, pingInterval, pongTimeout, gapDelay };
    this.#default = new Cursor({ lastEventId, gapDelay });
    // Events at which connections are often dead, or possible again.
    const { signal } = this.#listening;
    for (const name of ["online", "offline", "pageshow", "visibilitychange"])
      globalThis.addEventListener?.(name, () => this.#onWake(), { signal });
    queueMicrotask(() => this.state === "connecting" && this.#open()); // handlers added meanwhile get all events
  }

  get state() { return this.#default.state; }
  get lastEventId() { return this.#default.lastEventId; }
  on(name, handler) { return this.#default.on(name, handler); }
  send(message) { return this.#send(this.#default, message); }
  close() { this.#end(1000, "closed by the page"); }

  setToken(token) {
    this.#options.token = token;
    if (this.state === "live") this.#sendToken();
  }

  subscribe(channel, { lastEventId, history, presence } = {}) {
    if (this.state === "closed") throw failure("closed", "not subscribed, the client is closed: create a new one");
    const before = this.#subscriptions.get(channel);
    const isDefault = channel === (this.#url.searchParams.get("channel") ?? DEFAULT_CHANNEL);
    if (isDefault || (before && before.state !== "closed"))
      throw failure("subscribed", `already subscribed to ${channel}`);
    const cursor = new Cursor({ channel, lastEventId, history, presence, gapDelay: this.#options.gapDelay });
    if (this.state === "waiting") cursor.state = "waiting";
    if (before) Object.assign(cursor, { ref: before.ref, followed: before.followed }); // its unsubscribe comes first
    this.#subscriptions.set(channel, cursor);
    queueMicrotask(() => this.#sendRequests()); // one frame for all that are added meanwhile
    return {
      channel,
      get state() { return cursor.state; },
      get lastEventId() { return cursor.lastEventId; },
      on: (name, handler) => cursor.on(name, handler),
      send: (message) => this.#send(cursor, message),
      close: () => this.#unsubscribe(cursor),
    };
  }

  #send(cursor, message) {
    return new Promise((resolve, reject) => {
      const ref = ++this.#ref;
      const { channel, joined } = cursor;
      const text = JSON.stringify({
        ...(typeof message === "string" ? { text: message } : message), ...(channel !== undefined && { channel }), ref,
      });
      const open = this.state === "live" && !(this.#socket.readyState > 1); // a closing socket sends nothing
      if (cursor.state === "closed" || (joined && !open))
        return reject(failure("offline", "not sent, there is no connection"));
      if (!joined && !this.#mayWait(text))
        return reject(failure("offline", "not sent, too many messages wait for the first connection"));
      if (joined) this.#socket.send(text);
      this.#pending.set(ref, { text, cursor, sent: joined, resolve, reject });
    });
  }

  #mayWait({ length }) {
    const waiting = [...this.#pending.values()].filter(({ sent }) => !sent);
    for (const { text } of waiting) length += text.length;
    return waiting.length < MAX_WAITING && length <= MAX_WAITING_LENGTH;
  }

  async #open() {
    this.#default.setState("connecting");
    if (this.state !== "connecting") return; // a handler has closed it
    const attempt = (this.#socket = {}); // stands for the socket while the token is fetched
    this.#setTimer(CONNECT_TIMEOUT, () => this.#onLost(1006, "no welcome in time"));
    this.#forEach((cursor) => cursor.state === "waiting" && cursor.setState("connecting"));
    if (this.#socket !== attempt) return;
    try {
      const url = new URL(this.#url);
      url.searchParams.set("lastEventId", this.#default.position ?? "");
      let token = (this.#attemptToken = this.#options.token);
      if (typeof token === "function") token = await token();
      if (this.#socket !== attempt) return; // closed or timed out meanwhile
      if (token) url.searchParams.set("token", token);
      const socket = (this.#socket = new this.#WebSocket(url.href, "fanfare.v1"));
      socket.onmessage = ({ data }) => socket === this.#socket && this.#onData(data);
      socket.onclose = ({ code, reason }) => socket === this.#socket && this.#onLost(code, reason);
      // Node 22 emits no close after an error before the connection is open.
      socket.onerror = ({ message = "" }) =>
        socket === this.#socket && this.state === "connecting" && this.#onLost(1006, message);
    } catch (error) {
      if (this.#socket === attempt) this.#onLost(1006, "the connection could not be opened", error);
    }
  }

  #onData(data) {
    this.#lastFrame = performance.now();
    let frame = null;
    try { frame = JSON.parse(data); } catch {}
    if (typeof frame === "object" && frame !== null && !Array.isArray(frame)) return this.#onFrame(frame, data);
    // Not from a server of this version. An event ends with its id: skip it, or every resume would repeat it.
    const text = String(data);
    const [, channel] = /^{"channel":"([^"]+)"/.exec(text.slice(0, 160)) ?? [];
    const [, id = 0] = /"id":(\d{1,16})}$/.exec(text.slice(-22)) ?? [];
    const cursor = this.#subscriptions.get(channel) ?? this.#default;
    cursor.emit("error", failure("unreadable", "the server sent a frame that is not a JSON object"));
    if (cursor.state === "live" && cursor.position !== null)
      cursor.skipTo(Math.max(cursor.position, id), "unreadable");
  }

  #onFrame(frame, text) {
    const { id, type, channel } = frame;
    const cursor = channel === undefined ? this.#default : this.#subscriptions.get(channel);
    if (typeof id === "number" && type !== "ack") return this.#onEvent(frame, text, cursor);
    switch (type) {
      case "welcome": return cursor === this.#default ? this.#onWelcome(frame) : this.#onSubscribed(frame, cursor);
      case "ack": return this.#takePending(frame)?.resolve(id);
      case "ping": return this.#onPing(frame);
      case "reset": return cursor?.state === "live" && cursor.skipTo(frame.lastEventId, "reset");
      case "error": return this.#onError(frame, cursor);
      case "presence": return cursor?.onPresence(frame);
      case "unsubscribed": return cursor && this.#onUnsubscribed(frame, cursor);
      case "token_expiring": return this.#onTokenExpiring(frame.in);
      default: this.#onEvent(frame, text, cursor);
    }
  }

  // Events of subscriptions begin with their channel. Elsewhere a `channel` is the event's own, on the default channel.
  #onEvent(frame, text, cursor) {
    (text.startsWith('{"channel":') ? cursor : this.#default)?.onEvent(frame);
  }

  #onPing({ lastEventId, channels = {} }) {
    if (lastEventId !== undefined) this.#default.moveTo(lastEventId);
    for (const [channel, position] of Object.entries(channels)) {
      const cursor = this.#subscriptions.get(channel);
      if (cursor?.state === "live") cursor.moveTo(position);
    }
  }

  #takePending({ ref }) {
    const sent = this.#pending.get(ref);
    this.#pending.delete(ref);
    return sent;
  }

  #onWelcome(frame) {
    this.#attempts = 0;
    this.#liveSince = performance.now();
    this.#schedulePing();
    if (this.#options.token !== this.#attemptToken) this.#sendToken();
    this.#sendWaiting(this.#default);
    this.#default.onWelcome(frame);
    this.#sendRequests();
  }

  #sendWaiting(cursor) {
    cursor.joined = true;
    for (const message of this.#pending.values()) {
      if (message.sent || message.cursor !== cursor) continue;
      message.sent = true;
      this.#socket.send(message.text);
    }
  }

  // Subscribes and unsubscribes what the server does not know yet.
  #sendRequests() {
    if (this.state !== "live") return; // the next welcome comes here, too
    const added = [];
    this.#forEach((cursor) => {
      if (cursor.ref !== null || cursor.state === "live") return;
      if (cursor.followed) this.#socket.send(JSON.stringify(
        { type: "unsubscribe", channel: cursor.channel, ref: (cursor.ref = ++this.#ref) }));
      else added.push(cursor);
    });
    for (let at = 0; at < added.length; at += MAX_CHANNELS) this.#sendSubscribe(added.slice(at, at + MAX_CHANNELS));
    for (const cursor of added) if (cursor.state === "waiting") cursor.setState("connecting");
  }

  #sendSubscribe(cursors) {
    const ref = ++this.#ref;
    const channels = cursors.map((cursor) => {
      cursor.ref = ref;
      const { channel, position, history, presence } = cursor;
      return { channel, ...(position === null ? { history } : { lastEventId: position }), presence };
    });
    this.#socket.send(JSON.stringify({ type: "subscribe", channels, ref }));
  }

  #onSubscribed(frame, cursor) {
    if (!cursor || frame.ref !== cursor.ref) return; // of an earlier subscription
    Object.assign(cursor, { ref: null, followed: true, failures: 0 });
    this.#sendWaiting(cursor);
    cursor.onWelcome(frame);
  }

  #unsubscribe(cursor) {
    if (cursor.state === "closed") return;
    if (cursor.followed || cursor.ref !== null) {
      if (!cursor.followed) Object.assign(cursor, { ref: null, followed: true }); // a subscribe is under way: cancel it
      queueMicrotask(() => this.#sendRequests());
    } else this.#subscriptions.delete(cursor.channel);
    this.#endCursor(cursor, 1000, "closed by the page");
  }

  #onUnsubscribed({ reason }, cursor) {
    if (reason !== "requested" && cursor.state !== "closed")
      this.#endSubscription(cursor, reason, UNSUBSCRIBED[reason] ?? reason);
    else this.#onNotFollowed(cursor);
  }

  #onNotFollowed(cursor) {
    Object.assign(cursor, { ref: null, followed: false });
    if (cursor.state === "closed") this.#subscriptions.delete(cursor.channel);
    else this.#sendRequests(); // subscribed again meanwhile
  }

  #onError({ ref, channel, code, message }, cursor = this.#default) {
    const error = failure(code, message);
    const sent = this.#takePending({ ref });
    if (sent) return sent.reject(error);
    const refused = [...this.#subscriptions.values()].filter((cursor) =>
      cursor.ref === ref && (channel === undefined || channel === cursor.channel));
    // One wrong channel makes the whole frame invalid: try each alone.
    if (refused.length > 1 && code === "invalid") return refused.forEach((cursor) => this.#sendSubscribe([cursor]));
    for (const cursor of refused) this.#onRefused(cursor, error);
    const isStale = channel !== undefined && ref !== undefined; // an answer to an earlier subscription
    if (refused.length === 0 && !isStale) cursor.emit("error", error);
  }

  #onRefused(cursor, error) {
    const { code, message } = error;
    cursor.ref = null;
    if (!TEMPORARY.has(code)) {
      if (cursor.followed) return this.#onNotFollowed(cursor); // an unsubscribe
      return this.#endSubscription(cursor, code, message);
    }
    cursor.failures++;
    const delay = this.#retryDelay(cursor.failures);
    if (cursor.state === "closed") return;
    cursor.setState("waiting", { delay, code, reason: message });
    if (cursor.failures === ATTEMPTS) cursor.emit("error", error);
  }

  // Milliseconds until refused requests are repeated, all in one frame.
  #retryDelay(failures) {
    const now = performance.now();
    if (!this.#retry) {
      const delay = Math.random() * maxDelay(failures);
      const timer = setTimeout(() => {
        this.#retry = null;
        this.#sendRequests();
      }, delay);
      this.#retry = { timer, at: now + delay };
    }
    return Math.max(0, this.#retry.at - now);
  }

  #endSubscription(cursor, code, reason) {
    this.#subscriptions.delete(cursor.channel);
    this.#endCursor(cursor, code, reason);
    cursor.emit("error", failure(code, reason));
  }

  #endCursor(cursor, code, reason) {
    for (const [ref, message] of this.#pending) {
      if (message.sent || message.cursor !== cursor) continue;
      this.#pending.delete(ref);
      message.reject(failure("offline", `not published: ${reason}`));
    }
    cursor.end(code, reason);
  }

  // Calls an action for each subscription, also if it adds or removes some.
  #forEach(action) { [...this.#subscriptions.values()].forEach(action); }

  // Tokens are often issued at the same time, for example after a restart of the server: spread their renewal.
  #onTokenExpiring(seconds) {
    if (typeof this.#options.token !== "function") return;
    clearTimeout(this.#tokenTimer);
    this.#tokenTimer = setTimeout(() => this.#sendToken(), seconds * 1000 * (0.25 + Math.random() / 2));
  }

  async #sendToken() {
    const socket = this.#socket;
    try {
      let { token } = this.#options;
      if (typeof token === "function") token = await token();
      if (token && socket === this.#socket) socket.send(JSON.stringify({ type: "token", token }));
    } catch (error) {
      if (socket === this.#socket) this.#default.emit("error", error);
    }
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
    if (this.state === "live") this.#ping();
    else if (this.state === "waiting" && !this.#busy) this.#open();
  }

  #onLost(code, reason, cause) {
    const steady = performance.now() - this.#liveSince > STEADY_AFTER;
    this.#rejectedTokens = (steady ? 0 : this.#rejectedTokens) + TOKEN_REJECTED.has(code);
    const renewable = typeof this.#options.token === "function" && this.#rejectedTokens < ATTEMPTS;
    if (FINAL.has(code) || (TOKEN_REJECTED.has(code) && !renewable)) return this.#end(code, reason);
    const wasLive = this.state === "live";
    if (!wasLive && cause === undefined) this.#attempts++;
    this.#drop();
    this.#rejectSent(code, "the connection was lost");
    this.#busy = BUSY.has(code);
    this.#failures = steady ? 1 : this.#failures + 1;
    let ceiling = maxDelay(this.#failures);
    if (code === 1012) ceiling = 2 * FIRST_DELAY; // the node is stopping: reconnect soon, but not all at once
    const delay = this.#busy ? 5_000 + Math.random() * (MAX_DELAY - 5_000) : Math.random() * ceiling;
    this.#setTimer(delay, () => this.#open());
    this.#default.setState("waiting", { delay, code, reason });
    this.#forEach((cursor) => cursor.state !== "closed" && cursor.setState("waiting", { delay, code, reason }));
    if (cause !== undefined) this.#default.emit("error", cause);
    else if (wasLive && MESSAGE_ERRORS.has(code))
      this.#default.emit("error", failure(code, reason || "a message was not accepted"));
    else if (this.#attempts === ATTEMPTS) this.#default.emit("error", failure("unreachable",
      `no connection after ${ATTEMPTS} attempts (${reason ? `${code}, ${reason}` : code}): ${CHECK}`));
  }

  #end(code, reason) {
    if (this.state === "closed") return;
    this.#listening.abort();
    this.#drop();
    this.#rejectSent(code, reason || `closed with ${code}`);
    this.#endCursor(this.#default, code, reason);
    this.#forEach((cursor) => cursor.state !== "closed" && this.#endCursor(cursor, code, reason));
    this.#subscriptions.clear();
    if (code !== 1000) this.#default.emit("error", failure(code, reason || `closed with ${code}`));
  }

  // Drops the socket without waiting for its close event, which takes long on a dead connection.
  #drop() {
    const socket = this.#socket;
    for (const timer of [this.#timer, this.#tokenTimer, this.#retry?.timer]) clearTimeout(timer);
    this.#retry = null;
    this.#forEach((cursor) => {
      Object.assign(cursor, { ref: null, followed: false });
      if (cursor.state === "closed") this.#subscriptions.delete(cursor.channel);
    });
    this.#socket = null; // first, since close() may emit an error at once
    this.#liveSince = Infinity;
    socket?.close?.(1000);
  }

  // The server reads messages in order and stops at the first that is too big. The largest is that one or comes
  // after it.
  #rejectSent(code, reason) {
    const lost = [...this.#pending].filter(([, { sent }]) => sent);
    for (const [ref] of lost) this.#pending.delete(ref);
    let tooBig = Infinity;
    if (code === TOO_BIG) {
      const sizes = lost.map(([, { text }]) => new TextEncoder().encode(text).length);
      tooBig = sizes.indexOf(sizes.reduce((a, b) => Math.max(a, b), 0));
    }
    lost.forEach(([, { reject }], at) => {
      if (at === tooBig) reject(failure("too_big", "not published, the message is too big"));
      else if (at > tooBig) reject(failure("offline", `not published: ${reason}`));
      else reject(failure("unknown", `the message may or may not have been published: ${reason}`));
    });
  }

  #setTimer(delay, action) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(action, delay);
  }
}
