/** The client of fanfare. The server serves it as `/fanfare.js`, an ES module without dependencies. */

/** An event as it arrives: what the publisher gave, and what the server added. */
export interface FanfareEvent {
  /**
   * Its place in the channel, rising but not without gaps: events for other users take ids too.
   * Missing on events from a bare Redis channel, which are never replayed.
   */
  id?: number;
  /** The user who sent it; missing when a backend published it. */
  sender?: string;
  /** The only user it is for. */
  to?: string;
  text?: string;
  data?: unknown;
  /** Backends publish objects of any shape. */
  [key: string]: unknown;
}

export interface FanfareOptions {
  /** The channel to follow; the server's default is `ws_broadcast`. */
  channel?: string;
  /**
   * Resume from here, as from a stored `fanfare.lastEventId`. Without it (or with an empty one) the first
   * event is the next one to be published.
   */
  lastEventId?: number | string | null;
  /**
   * A JWT, where the server asks for one. A function is called before each attempt; while it fails, attempts
   * go on with growing delays, each with an `error`.
   */
  token?: string | (() => string | null | undefined | Promise<string | null | undefined>);
  /** Milliseconds without a frame until the server is asked for a sign of life (30,000). */
  pingInterval?: number;
  /** Milliseconds it may take to give one (10,000). */
  pongTimeout?: number;
}

export type FanfareState =
  /** An attempt is under way: from its start to the server's welcome. */
  | { state: "connecting" }
  /** The server has said where we stand: events flow, and `send` works. */
  | { state: "live" }
  /**
   * Lost; the next attempt begins after `delay` milliseconds, or sooner when the network comes back or the
   * page is shown. `code` is the WebSocket close code; 1006 also stands for a connection that died silently.
   */
  | { state: "waiting"; delay: number; code: number; reason: string }
  /**
   * Over for good: 1000 after `close()`, 4001 (the token ended and no fresh one helped), 4003 (not allowed), or
   * 1002, 1003, 1007 (the other side finds this client's protocol wrong).
   */
  | { state: "closed"; code: number; reason: string };

/**
 * `code` is a word when it is about a message: `offline` (not sent), `unknown` (it may or may not have been
 * published) or the server's error code; `unreadable` for a frame that is skipped; the close code when it is about a connection.
 */
export interface FanfareError extends Error {
  name: "FanfareError";
  code: string | number;
}

export interface FanfareEventMap<E> {
  /** In id order, each once. `recovered`: it was published before this connection began. */
  message: (event: E, info: { recovered: boolean }) => void;
  /** Each change, the first `connecting` included. */
  state: (state: FanfareState) => void;
  /** Resumed with nothing missing: what came after `lastEventId`, up to `head`, follows as messages. */
  recovered: (info: { lastEventId: number; head: number }) => void;
  /**
   * Events before `lastEventId` may be missing: load the state anew. `from` tells whether the server said so
   * on connecting (`welcome`) or in the middle of a connection (`reset`), or a frame was skipped (`unreadable`).
   */
  gap: (info: { lastEventId: number; from: "welcome" | "reset" | "unreadable" }) => void;
  /**
   * A token function failed (its own error), the server refused something that no `send` waits for, a message
   * was too long (1009) or too long on its way (1008), a frame was no JSON object and is skipped (`unreadable`), or the
   * connection is over for good.
   */
  error: (error: FanfareError | Error) => void;
}

/** One user's connection to one channel, kept up until `close()`. */
export class Fanfare<E extends object = FanfareEvent> {
  /**
   * Connects at once. Handlers added in the same turn hear everything.
   * @param url `wss://host/ws/USER`, with `http` for `ws` if you like; in a browser also `/ws/USER`. Put the
   * user's name through `encodeURIComponent`.
   */
  constructor(url: string | URL, options?: FanfareOptions);

  readonly state: FanfareState["state"];

  /** Our position: store it to resume later. Null until the server has given one. */
  readonly lastEventId: number | null;

  /** Adds a handler; returns the function that takes it away. */
  on<K extends keyof FanfareEventMap<E>>(name: K, handler: FanfareEventMap<E>[K]): () => void;

  /**
   * Publishes a text or any JSON value, to everyone in the channel or to one user. Resolves with the event's id
   * once the server has it; rejects with a {@link FanfareError}. Nothing is queued or sent again: after
   * `offline` trying again is safe, after `unknown` it may say things twice.
   */
  send(message: string | { text: string; to?: string } | { data: unknown; to?: string }): Promise<number>;

  /** Ends it for good. What is not yet acknowledged rejects as `unknown`. */
  close(): void;
}
