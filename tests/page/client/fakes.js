// Tests of fanfare.js with a fake clock and WebSocket, for everything that a server may send. This and another file are
// the body of a function that runs in the browser, can use `Fanfare`, and returns what failed.

const { random } = Math;
const real = { setTimeout, clearTimeout, WebSocket };
const clock = { now: 1, timers: new Map(), next: 0 };
let sockets = []; // of the newest client
let newest;

class FakeSocket {
  constructor(url, protocol) {
    Object.assign(this, { url: new URL(url), protocol, sent: [], closed: null });
    sockets.push(this);
  }
  send(text) { this.sent.push(JSON.parse(text)); }
  close(code) { this.closed = code; }
  says(frame) { this.sends(JSON.stringify(frame)); }
  sends(data) { this.onmessage({ data }); }
  ends(code, reason = "") { this.onclose({ code, reason }); }
  fails(message) { this.onerror({ message }); }
}

/** Lets promises settle. */
const settle = () => new Promise((resolve) => {
  const channel = new MessageChannel();
  channel.port1.onmessage = () => { channel.port1.close(); resolve(); };
  channel.port2.postMessage(0);
});

/** Lets time pass, timer by timer. */
async function pass(ms) {
  const until = clock.now + ms;
  await settle();
  for (;;) {
    const due = [...clock.timers].filter(([, { at }]) => at <= until).sort(([, a], [, b]) => a.at - b.at)[0];
    if (!due) break;
    clock.timers.delete(due[0]);
    clock.now = Math.max(clock.now, due[1].at);
    due[1].action();
    await settle();
  }
  clock.now = until;
}

function equal(found, expected) {
  const [a, b] = [found, expected].map((value) => JSON.stringify(value));
  if (a !== b) throw new Error(`${a} instead of ${b}`);
}

const outcome = (promise) => promise.then((id) => id, ({ name, code }) => `${name} ${code}`);

/** A client with everything it says written down. The one before it ends. */
function client(options, names = ["message", "state", "recovered", "gap", "error"]) {
  newest?.close();
  sockets = [];
  const fanfare = newest = new Fanfare("ws://node/ws/alice", options);
  const said = [];
  for (const name of names) {
    fanfare.on(name, (...values) => said.push([name, ...values]));
  }
  const last = () => sockets[sockets.length - 1];
  return {
    fanfare, said, last,
    heard: (name) => said.filter(([kind]) => kind === name).map(([, value]) => value),
    state: () => said.filter(([kind]) => kind === "state").at(-1)[1],
    /** Lets the attempt under way succeed. */
    async live(at = 100, head = at, recovered = true) {
      await settle();
      last().says({ type: "welcome", lastEventId: at, head, recovered });
    },
  };
}

/** Runs tests one after the other. */
async function run(tests) {
  globalThis.WebSocket = FakeSocket;
  globalThis.setTimeout = (action, ms) => {
    clock.timers.set(++clock.next, { action, at: clock.now + ms });
    return clock.next;
  };
  globalThis.clearTimeout = (timer) => clock.timers.delete(timer);
  performance.now = () => clock.now;
  const failed = [];
  for (const [name, test] of Object.entries(tests)) {
    Math.random = () => 0.5;
    try {
      await test();
    } catch (error) {
      failed.push(`${name}: ${error.message} (${error.stack.match(/:\d+:\d+/g)?.[1]})`);
    }
  }
  Math.random = random;
  Object.assign(globalThis, real);
  delete performance.now;
  return { passed: Object.keys(tests).length - failed.length, failed };
}

