/**
 * The client of fanfare. The server serves it as `/fanfare.js`, an ES module without dependencies, and these types as
 * `/fanfare.d.ts` and, for a copy named `fanfare.mjs`, as `/fanfare.d.mts`.
 */

/** An event: the members given by its publisher, and those added by the server. */
export interface FanfareEvent {
  /**
   * Its position in the channel. Ids rise, with gaps: private events for other users have ids as well.
   * Missing on events of plain Redis PUBLISH, which are never replayed.
   */
  id?: number;
  /** The user that sent it; missing if a backend published it. */
  sender?: string;
  /** The recipient of a private event. */
  to?: string;
  text?: string;
  data?: unknown;
  /** Backends publish objects of any shape. */
  [key: string]: unknown;
}

export interface FanfareOptions {
  /** The channel; the server's default is `ws_broadcast`. */
  channel?: string;
  /**
   * Resumes after this id, for example a stored `fanfare.lastEventId`. Without it (or if it is empty) the
   * first event is the next one published, unless `history` is given.
   */
  lastEventId?: number | string | null;
  /**
   * Without `lastEventId` the last events of the channel come first, as messages with `recovered`: up to this
   * many (1 to 100), fewer if some of them are for other users.
   */
  history?: number;
  /**
   * A JWT, if the server requires one. A function is called before each attempt. While it fails, attempts
   * continue with growing delays, each with an `error`. After three rejected tokens in a row they end.
   */
  token?: string | (() => string | null | undefined | Promise<string | null | undefined>);
  /** Milliseconds without a frame until a ping is sent (30,000). */
  pingInterval?: number;
  /** Milliseconds until the server must have answered it (10,000). */
  pongTimeout?: number;
  /**
   * The maximum of the random delay before `gap`, in milliseconds (3,000), so that thousands of clients do not load
   * their state in one instant. With 0 it comes at once, before any later event.
   */
  gapDelay?: number;
  /** The WebSocket class, if the runtime has none (Node 20): for example that of the package `ws`. */
  WebSocket?: new (url: string, protocol: string) => FanfareSocket;
}

/** What the client needs of a WebSocket, besides the handlers `onmessage`, `onclose` and `onerror`. */
export interface FanfareSocket {
  readonly readyState: number;
  send(data: string): void;
  close(code?: number): void;
}

export type FanfareState =
  /** Connecting: from the start of an attempt to the server's welcome. */
  | { state: "connecting" }
  /** Connected: events arrive, and `send` works. */
  | { state: "live" }
  /**
   * Disconnected. The next attempt starts after `delay` milliseconds, or sooner when the network comes back or
   * the page is shown. `code` is the WebSocket close code; 1006 also if the server did not answer a ping.
   */
  | { state: "waiting"; delay: number; code: number; reason: string }
  /**
   * Closed, without further attempts: 1000 after `close()`; 4400 (bad request), 4401 (token missing, invalid or
   * expired), 4403 (channel or origin not allowed); 4001 (token expired), 4003 (may not publish); 1002, 1003, 1007
   * (protocol error).
   */
  | { state: "closed"; code: number; reason: string };

/**
 * `code` for a message: `offline` or `too_big` (not published), `unknown` (it may or may not have been published) or
 * the server's error code. For a skipped frame: `unreadable`. For three failed attempts: `unreachable`. For a
 * connection: its close code.
 */
export interface FanfareError extends Error {
  name: "FanfareError";
  code: string | number;
}

export interface FanfareEventMap<E> {
  /** Events in id order, each once. `recovered`: published before this connection was opened. */
  message: (event: E, info: { recovered: boolean }) => void;
  /** Every change, including the first `connecting`. */
  state: (state: FanfareState) => void;
  /** Resumed without a gap: the events after `lastEventId`, up to `head`, follow as messages. */
  recovered: (info: { lastEventId: number; head: number }) => void;
  /**
   * Events up to `lastEventId` may be missing: reload the state. All later events follow, and some before it may have
   * come since the gap was noticed. `from` is `welcome` (on connecting), `reset` (while connected) or `unreadable` (a
   * frame was skipped).
   */
  gap: (info: { lastEventId: number; from: "welcome" | "reset" | "unreadable" }) => void;
  /**
   * The connection is closed without further attempts, or three attempts in a row failed (`unreachable`; attempts
   * continue). A token function failed (with its error), the server rejected a frame that no `send` waits for, a
   * message was too big (1009) or incomplete for too long (1008), or a frame was not a JSON object (`unreadable`).
   * Without a handler the console gets a warning, once for each text.
   */
  error: (error: FanfareError | Error) => void;
}

/** One user's connection to one channel. It reconnects until `close()`. */
export class Fanfare<E extends object = FanfareEvent> {
  /**
   * Connects at once. Handlers added in the same turn get all events.
   * @param url `wss://host/ws/USER`, or with `https`; in a browser also `/ws/USER`. Encode the user id with
   * `encodeURIComponent`.
   * @throws TypeError if the runtime has no WebSocket and the options name none.
   */
  constructor(url: string | URL, options?: FanfareOptions);

  readonly state: FanfareState["state"];

  /**
   * The current position: store it to resume later. Null before the first welcome. It stays before a gap until `gap`
   * is emitted, and goes back only with a `gap`.
   */
  readonly lastEventId: number | null;

  /** Adds a handler. Returns a function that removes it. */
  on<K extends keyof FanfareEventMap<E>>(name: K, handler: FanfareEventMap<E>[K]): () => void;

  /**
   * Publishes a text or any JSON value to the channel or to one user. Resolves with the id of the event;
   * rejects with a {@link FanfareError}. Before the first connection up to 64 messages with 262,144 characters wait
   * for it. Otherwise nothing is queued, and nothing is sent again: a retry after `offline` is safe, a retry after
   * `unknown` may publish twice.
   */
  send(
    message: string | { text: string; to?: string; data?: never } | { data: unknown; to?: string; text?: never },
  ): Promise<number>;

  /** Closes the connection. Unanswered messages reject with `unknown`, unsent ones with `offline`. */
  close(): void;
}
