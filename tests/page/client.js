// Tests of fanfare.js with a fake clock and WebSocket, for everything that a server may send. The body of a function
// that runs in the browser, can use `Fanfare`, and returns what failed.

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

/** A client with everything it says written down. The one before it ends. */
function client(options) {
  newest?.close();
  sockets = [];
  const fanfare = newest = new Fanfare("ws://node/ws/alice", options);
  const said = [];
  for (const name of ["message", "state", "recovered", "gap", "error"]) {
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

const tests = {
  async addresses_and_protocol() {
    const a = client({ channel: "news & more", lastEventId: "7", token: "a b" });
    await settle();
    equal(a.last().url.href, "ws://node/ws/alice?channel=news+%26+more&lastEventId=7&token=a+b");
    equal(a.last().protocol, "fanfare.v1");
    const b = client();
    await settle();
    equal(b.last().url.search, "?lastEventId=");
    const relative = new Fanfare("/ws/a?x=1"); // relative to the page
    await settle();
    relative.close();
    equal([b.last().url.host, b.last().url.pathname, b.last().url.search],
      [location.host, "/ws/a", "?x=1&lastEventId="]);
    equal(client({ lastEventId: 0 }).fanfare.lastEventId, 0);
  },

  async events_come_once_and_in_order() {
    const { fanfare, said, last, live, heard } = client();
    await live(100);
    for (const id of [101, 103, 103, 102, 104]) last().says({ sender: "bob", text: "x", id });
    last().says({ text: "raw" });
    last().says({ type: "ack", text: "an event may be of any type", id: 105, ref: 1 });
    equal(heard("message").map(({ id }) => id), [101, 103, 104, undefined]);
    equal(fanfare.lastEventId, 104);
    equal(said[0], ["state", { state: "connecting" }]);
    equal(said[1], ["state", { state: "live" }]);
  },

  async it_resumes_where_it_was() {
    const { said, last, live, heard } = client();
    await live(100);
    equal([heard("recovered"), heard("gap")], [[], []]);
    last().says({ text: "a", id: 101 });
    last().says({ type: "ping", lastEventId: 150 });
    last().ends(1006);
    await pass(1_000);
    equal([sockets.length, last().url.searchParams.get("lastEventId")], [2, "150"]);
    await live(150, 152);
    equal(heard("recovered"), [{ lastEventId: 150, head: 152 }]);
    for (const id of [151, 152, 153]) last().says({ text: "b", id });
    const marks = said.slice(-3).map(([, { id }, { recovered }]) => [id, recovered]);
    equal(marks, [[151, true], [152, true], [153, false]]);
  },

  async gaps_are_emitted() {
    const { fanfare, last, live, heard } = client({ lastEventId: 500 });
    await live(200, 200, false); // ids may only be lower after a gap
    equal(heard("gap"), [{ lastEventId: 200, from: "welcome" }]);
    last().says({ text: "a", id: 201 });
    last().says({ type: "reset", lastEventId: 50 });
    last().says({ text: "b", id: 51 });
    equal(heard("gap")[1], { lastEventId: 50, from: "reset" });
    equal([heard("message").length, fanfare.lastEventId, heard("recovered")], [2, 51, []]);
  },

  async its_id_goes_back_only_with_a_gap() {
    const { fanfare, last, live, heard } = client();
    await live(100);
    last().says({ text: "a", id: 105 });
    last().says({ type: "ping", lastEventId: 103 });
    last().says({ text: "b", id: 104 });
    last().says({ type: "ping" });
    equal([fanfare.lastEventId, heard("message").length, heard("gap")], [105, 1, []]);
    last().ends(1006);
    await pass(1_000);
    await live(102, 110); // an answer to another question
    equal([fanfare.lastEventId, heard("gap")], [105, []]);
    last().says({ type: "reset", lastEventId: 90 });
    equal([fanfare.lastEventId, heard("gap")], [90, [{ lastEventId: 90, from: "reset" }]]);
  },

  async unreadable_frames_are_skipped() {
    const { fanfare, last, live, heard } = client();
    await settle();
    last().sends("a proxy's words");
    equal([fanfare.lastEventId, heard("error").length, heard("gap")], [null, 1, []]);
    await live(100);
    last().sends('{"a":1.,"id":105}');
    equal([fanfare.lastEventId, heard("gap")], [105, [{ lastEventId: 105, from: "unreadable" }]]);
    const frames = ["", "null", "7", '"id"', "[1]", '{"id":107', '{"a":.5,"id":99}', new Blob(["{}"])];
    for (const data of frames) last().sends(data);
    equal(heard("error").map(({ code }) => code), Array(frames.length + 2).fill("unreadable"));
    equal([fanfare.lastEventId, heard("message"), fanfare.state], [105, [], "live"]);
    last().says({ text: "a", id: 106 });
    last().sends('{"text":"deep","data":{"id":107},"id":1e3}'); // an unusual spelling of an id counts
    equal(heard("message").map(({ id }) => id), [106, 1000]);
    last().ends(1006);
    await pass(1_000);
    equal(last().url.searchParams.get("lastEventId"), "1000");
  },

  async frames_of_unknown_shape_are_events() {
    const { fanfare, last, live, heard } = client();
    await live();
    const sent = fanfare.send("hi");
    const frames = [{}, { type: null }, { type: ["ack"], ref: 1 }, { type: "news", ref: 1 }, { id: "7", ref: 1 }, { id: null }];
    for (const frame of frames) last().says(frame);
    last().sends('{"__proto__":{"id":200},"constructor":1,"hasOwnProperty":2}');
    equal([heard("message").length, fanfare.lastEventId, heard("error")], [frames.length + 1, 100, []]);
    last().says({ type: "ack", ref: 1, id: 101 });
    equal(await sent, 101); // only an answer settles it
  },

  async sending_settles_as_the_server_says() {
    const { fanfare, last, live } = client();
    const outcome = (promise) => promise.then((id) => id, ({ name, code }) => `${name} ${code}`);
    equal(await outcome(fanfare.send("early")), "FanfareError offline");
    await live();
    const outcomes = ["text", { data: [1], to: "bob" }, "too fast", "lost", { text: "t", to: "x", ref: "mine" }]
      .map((message) => outcome(fanfare.send(message)));
    const [a, b, c, d, e] = last().sent;
    equal(a, { text: "text", ref: 1 });
    equal(b, { data: [1], to: "bob", ref: 2 });
    equal(e, { text: "t", to: "x", ref: 5 });
    last().says({ type: "ack", ref: b.ref, id: 102 });
    last().says({ type: "ack", ref: a.ref, id: 101 });
    last().says({ type: "error", ref: c.ref, code: "rate_limited", message: "slow down" });
    last().ends(1006);
    equal(await Promise.all(outcomes),
      [101, 102, "FanfareError rate_limited", "FanfareError unknown", "FanfareError unknown"]);
    equal([fanfare.lastEventId, d.ref], [100, 4]); // acks do not move it
  },

  async errors_without_a_sender_are_emitted() {
    const { last, live, heard } = client();
    await live();
    last().says({ type: "error", code: "invalid", message: "no JSON" });
    last().says({ type: "ping", lastEventId: 0 });
    equal(heard("error").map(({ code, message }) => [code, message]), [["invalid", "no JSON"]]);
  },

  async delays_double_with_full_jitter() {
    const { last, state } = client();
    const delays = [];
    for (let attempt = 0; attempt < 8; attempt++) {
      await settle();
      last().ends(1006);
      delays.push(state().delay);
      await pass(state().delay - 1);
      equal(state().state, "waiting");
      await pass(1);
      equal([state().state, sockets.length], ["connecting", attempt + 2]);
    }
    equal(delays, [500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]); // half of the maximum: random is 0.5
    Math.random = () => 0;
    await settle();
    last().ends(1006);
    equal(state().delay, 0);
  },

  async only_a_steady_connection_starts_the_delays_anew() {
    const { last, live, state } = client();
    await live();
    last().ends(1006);
    equal(state().delay, 500);
    await pass(500);
    await live();
    await pass(9_000);
    last().ends(1006);
    equal(state().delay, 1000);
    await pass(1000);
    await live();
    await pass(11_000);
    last().ends(1006);
    equal(state().delay, 500);
  },

  async codes_are_honoured() {
    const after = async (code, options) => {
      const { last, live, state, heard } = client(options);
      await live();
      last().ends(code, "why");
      const { state: word, delay, code: shown, reason } = state();
      equal([shown, reason], [code, "why"]);
      const count = sockets.length;
      await pass(60_000);
      equal(sockets.length > count, word === "waiting");
      return [word, delay ?? heard("error").map(({ code }) => code)];
    };
    for (const blame of [1008, 1009]) {
      const blamed = client();
      await blamed.live();
      blamed.last().ends(blame, "this message");
      equal(blamed.heard("error").map(({ code, message }) => [code, message]), [[blame, "this message"]]);
    }
    equal(await after(1012), ["waiting", 1000]);
    equal(await after(1013), ["waiting", 17500]);
    equal(await after(4029), ["waiting", 17500]);
    for (const code of [1000, 1001, 1005, 1006, 1008, 1009, 1011, 4008, 4009]) {
      equal(await after(code), ["waiting", 500]);
    }
    for (const code of [1002, 1003, 1007, 4003]) equal(await after(code), ["closed", [code]]);
    equal(await after(4001), ["closed", [4001]]);
    equal(await after(4001, { token: "fixed" }), ["closed", [4001]]);
    equal(await after(4001, { token: () => "fresh" }), ["waiting", 500]);
  },

  async a_token_is_renewed_once() {
    let count = 0;
    const { last, live, state } = client({ token: async () => `t${++count}` });
    await live();
    equal(last().url.searchParams.get("token"), "t1");
    await pass(11_000);
    last().ends(4001);
    await pass(1_000);
    equal(last().url.searchParams.get("token"), "t2");
    last().ends(1006); // t2 still counts as fresh
    await pass(2_000);
    await live();
    last().ends(4001);
    equal([state().state, count], ["closed", 3]);
  },

  async a_token_that_can_t_be_had_is_tried_again() {
    let works = false;
    const token = async () => { if (works) return "t"; throw new Error("no login"); };
    const { last, live, heard, state } = client({ token });
    await settle();
    equal([heard("error")[0].message, state().state, sockets.length], ["no login", "waiting", 0]);
    works = true;
    await pass(500);
    await live();
    equal([state().state, last().url.searchParams.get("token")], ["live", "t"]);
  },

  async attempts_that_hang_are_given_up() {
    const a = client();
    await settle();
    const first = a.last();
    await pass(15_000);
    equal([a.state().state, first.closed], ["waiting", 1000]);
    first.says({ type: "welcome", lastEventId: 1, head: 1, recovered: true }); // too late
    equal(a.state().state, "waiting");
    const b = client({ token: () => new Promise(() => {}) });
    await pass(15_000);
    equal([b.state().state, sockets.length], ["waiting", 0]);
    let give;
    const c = client({ token: () => new Promise((resolve) => (give = resolve)) });
    await settle();
    c.fanfare.close();
    give("late");
    await pass(1_000);
    equal([c.state().state, sockets.length], ["closed", 0]);
  },

  async silence_is_asked_about() {
    const { last, live, state } = client();
    await live();
    await pass(29_000);
    last().says({ type: "ping", lastEventId: 100 });
    await pass(29_000);
    equal(last().sent, []);
    await pass(1_000);
    equal(last().sent, [{ type: "ping" }]);
    await pass(9_000);
    last().says({ type: "ping", lastEventId: 0 });
    await pass(29_000);
    equal([state().state, last().sent.length], ["live", 1]);
    await pass(2_000);
    equal(last().sent.length, 2);
    const dead = last();
    await pass(8_999);
    equal(state().state, "live");
    await pass(1);
    equal([state().state, sockets.length], ["waiting", 1]);
    equal([state().code, dead.closed], [1006, 1000]);
    dead.says({ text: "late", id: 999 });
    dead.ends(1006);
    await pass(500);
    equal(last().url.searchParams.get("lastEventId"), "100");
  },

  async news_about_the_network_is_looked_into() {
    const { last, live, state } = client();
    await live();
    await pass(1_000);
    const moments = [[window, "online"], [window, "offline"], [window, "pageshow"], [document, "visibilitychange"]];
    for (const [target, name] of moments) {
      target.dispatchEvent(new Event(name, { bubbles: true }));
      equal(last().sent.pop(), { type: "ping" });
      await pass(1_000);
      last().says({ type: "ping", lastEventId: 0 });
      await pass(1_000);
    }
    dispatchEvent(new Event("offline"));
    dispatchEvent(new Event("online")); // the first ping keeps its timeout
    equal(last().sent, [{ type: "ping" }]);
    await pass(10_000);
    equal(state().state, "waiting");
    dispatchEvent(new Event("online"));
    await settle();
    equal([state().state, sockets.length], ["connecting", 2]);
    last().ends(1013);
    dispatchEvent(new Event("online"));
    document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));
    await settle();
    equal([state().state, sockets.length], ["waiting", 2]); // the server asked for time
  },

  async close_ends_everything() {
    const { fanfare, said, last, live, state, heard } = client();
    await live();
    const sent = fanfare.send("x").catch(({ code }) => code);
    fanfare.close();
    equal([await sent, last().closed], ["unknown", 1000]);
    equal(state(), { state: "closed", code: 1000, reason: "closed by the page" });
    const count = said.length;
    last().says({ text: "late", id: 999 });
    last().ends(1006);
    dispatchEvent(new Event("online"));
    fanfare.close();
    await pass(100_000);
    equal([said.length, sockets.length, fanfare.lastEventId, clock.timers.size], [count, 1, 100, 0]);
    equal(heard("error"), []);
    const early = client();
    early.fanfare.close();
    await pass(1_000);
    equal(sockets.length, 0);
    for (const [when, count] of [["connecting", 0], ["live", 1], ["waiting", 1]]) {
      const { fanfare, last, live } = client(); // closed by its own handler
      fanfare.on("state", ({ state }) => state === when && fanfare.close());
      if (count === 1) await live();
      last()?.ends(1006);
      await pass(100_000);
      equal([fanfare.state, sockets.length], ["closed", count]);
    }
  },

  async handlers_can_be_taken_away_and_may_throw() {
    const { fanfare, last, live, heard } = client();
    const uncaught = [];
    const catcher = (event) => { uncaught.push(event.message); event.preventDefault(); };
    addEventListener("error", catcher);
    let count = 0;
    const off = fanfare.on("message", () => { count++; throw new Error("the page's own"); });
    fanfare.on("message", () => count++);
    const added = [];
    const adding = fanfare.on("message", () => { adding(); fanfare.on("message", ({ id }) => added.push(id)); });
    await live();
    last().says({ text: "a", id: 101 });
    await settle();
    off();
    last().says({ text: "b", id: 102 });
    await settle();
    removeEventListener("error", catcher);
    equal([count, heard("message").length, uncaught], [3, 2, ["Uncaught Error: the page's own"]]);
    equal(added, [102]);
  },
};

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
