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
  /** The channel, if it came by a subscription. */
  channel?: string;
  text?: string;
  data?: unknown;
  /** Backends publish objects of any shape. */
  [key: string]: unknown;
}

export type FanfareToken = string | (() => string | null | undefined | Promise<string | null | undefined>);

/** Where a channel starts. */
export interface FanfareStart {
  /**
   * Resumes after this id, for example a stored `lastEventId`. Without it (or if it is empty) the first event is
   * the next one published, unless `history` is given.
   */
  lastEventId?: number | string | null;
  /**
   * Without `lastEventId` the last events of the channel come first, as messages with `recovered`: up to this
   * many (1 to 100), fewer if some of them are for other users.
   */
  history?: number;
  /**
   * Asks who is in the channel: `presence` is emitted. The server must track that (`--presence`), or it closes the
   * connection with 4400, or the subscription with `invalid`.
   */
  presence?: boolean;
}

export interface FanfareOptions extends FanfareStart {
  /**
   * The default channel, which the client itself follows; the server's is `ws_broadcast`. With null (or an empty
   * string) there is none: only subscriptions get events.
   */
  channel?: string | null;
  /**
   * A JWT, if the server requires one. A function is called before each attempt. While it fails, attempts
   * continue with growing delays, each with an `error`. After three rejected tokens in a row they end. It is also
   * called in the last minute of a token, after a random delay, and the server gets the new token on the open
   * connection.
   */
  token?: FanfareToken;
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

export type FanfareState<Code = number> =
  /** Connecting: from the start of an attempt to the server's welcome. */
  | { state: "connecting" }
  /** Connected: events arrive, and `send` works. */
  | { state: "live" }
  /**
   * Disconnected. The next attempt starts after `delay` milliseconds, or sooner when the network comes back or
   * the page is shown. `code` is the WebSocket close code; 1006 also if the server did not answer a ping.
   */
  | { state: "waiting"; delay: number; code: Code; reason: string }
  /**
   * Closed, without further attempts: 1000 after `close()`; 4400 (bad request), 4401 (token missing, invalid or
   * expired), 4403 (channel or origin not allowed); 4010 (a backend has disconnected or banned the user: `reason` says
   * which); 4001 (token expired), 4003 (may not publish); 1002, 1003, 1007 (protocol error).
   */
  | { state: "closed"; code: Code; reason: string };

/**
 * The state of a subscription. It is `waiting` and `closed` as its client is, with the same code, or for an error code
 * of the server: `unavailable` and `rate_limited` are tried again after `delay`; `forbidden`, `disconnected`, `too_many`
 * and `invalid` close the subscription.
 */
export type FanfareSubscriptionState = FanfareState<number | string>;

/**
 * `code` for a message: `offline` or `too_big` (not published), `unknown` (it may or may not have been published) or
 * the server's error code. For a skipped frame: `unreadable`. For three failed attempts: `unreachable`. For a
 * connection: its close code. For a subscription: the server's error code. Thrown by `subscribe`: `subscribed` or
 * `closed`.
 */
export interface FanfareError extends Error {
  name: "FanfareError";
  code: string | number;
}

export interface FanfareEventMap<E, State = FanfareState> {
  /** Events in id order, each once. `recovered`: published before this connection was opened. */
  message: (event: E, info: { recovered: boolean }) => void;
  /** Every change; of a client including the first `connecting`. */
  state: (state: State) => void;
  /** Resumed without a gap: the events after `lastEventId`, up to `head`, follow as messages. */
  recovered: (info: { lastEventId: number; head: number }) => void;
  /**
   * Events up to `lastEventId` may be missing: reload the state. All later events follow, and some before it may have
   * come since the gap was noticed. `from` is `welcome` (on connecting), `reset` (while connected) or `unreadable` (a
   * frame was skipped).
   */
  gap: (info: { lastEventId: number; from: "welcome" | "reset" | "unreadable" }) => void;
  /**
   * Who is in the channel: once after each connect, then at most once a second. `users` is null in large channels, which
   * show only `count`. `joined` and `left` are those who came and went since the last time, also over a reconnect.
   */
  presence: (info: { users: string[] | null; count: number; joined: string[]; left: string[] }) => void;
  /**
   * The connection is closed without further attempts, or three attempts in a row failed (`unreachable`; attempts
   * continue). A token function failed (with its error), the server rejected a frame that no `send` waits for, a
   * message was too big (1009) or incomplete for too long (1008), or a frame was not a JSON object (`unreadable`).
   * Of a subscription: the server has closed it, or refused it three times in a row (attempts continue).
   * Without a handler the console gets a warning, once for each text.
   */
  error: (error: FanfareError | Error) => void;
}

export type FanfareMessage =
  | string
  | ((
      | { text: string; to?: string; data?: never }
      | { data: unknown; to?: string; text?: never }
    ) & {
      /**
       * In a channel that is an inbox: a message that is sent again with the same key within ten minutes is not
       * stored twice.
       */
      key?: string;
    });

/** A channel that a client has subscribed to. It is resumed after each reconnect, until `close()`. */
export interface FanfareSubscription<E extends object = FanfareEvent> {
  readonly channel: string;
  readonly state: FanfareSubscriptionState["state"];

  /** As that of a client: the position in this channel. */
  readonly lastEventId: number | null;

  /** Adds a handler for what concerns this channel. Returns a function that removes it. */
  on<K extends keyof FanfareEventMap<E>>(
    name: K,
    handler: FanfareEventMap<E, FanfareSubscriptionState>[K],
  ): () => void;

  /**
   * Publishes to this channel, as `send` of a client. Messages wait until the subscription is first `live`, so that
   * it gets them as well.
   */
  send(message: FanfareMessage): Promise<number | string>;

  /** Ends the subscription. Unsent messages reject with `offline`. */
  close(): void;
}

/** One user's connection. It reconnects until `close()`. */
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
   * The current position in the default channel: store it to resume later. Null before the first welcome. It stays
   * before a gap until `gap` is emitted, and goes back only with a `gap`.
   */
  readonly lastEventId: number | null;

  /** Adds a handler. Returns a function that removes it. */
  on<K extends keyof FanfareEventMap<E>>(name: K, handler: FanfareEventMap<E>[K]): () => void;

  /**
   * Publishes a text or any JSON value to the channel or to one user. Resolves with the id of the event, or in a
   * channel that is an inbox with the id of the message (a string); rejects with a {@link FanfareError}. Before the
   * first connection up to 64 messages with 262,144 characters wait for it. Otherwise nothing is queued, and nothing is
   * sent again: a retry after `offline` is safe, a retry after `unknown` may publish twice, unless the message has a
   * `key`. With `channel` it publishes there, which needs no subscription.
   */
  send(message: string | (Exclude<FanfareMessage, string> & { channel?: string })): Promise<number | string>;

  /**
   * Follows one more channel on the same connection, in any state. There is no order of events across channels.
   * @throws FanfareError with code `subscribed` if the client or an open subscription follows the channel, `closed` if
   * the client is closed.
   */
  subscribe<S extends object = E>(channel: string, options?: FanfareStart): FanfareSubscription<S>;

  /**
   * Replaces the option `token`, and the token of an open connection: same user, new rights. A string is sent before
   * any later `subscribe`. If the server rejects it, an `error` with code `unauthorized` follows, and the old one stays.
   */
  setToken(token: FanfareToken): void;

  /** Closes the connection and its subscriptions. Unanswered messages reject with `unknown`, unsent ones with `offline`. */
  close(): void;
}
