// Attempts, delays, close codes, tokens and pings. See fakes.js.

return run({
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
    const newcomer = client({ history: 20 });
    await newcomer.live(7);
    equal(newcomer.last().url.search, "?history=20&lastEventId=");
    newcomer.last().ends(1006);
    await pass(500);
    equal(newcomer.last().url.search, "?history=20&lastEventId=7");
    equal(client({ lastEventId: 0 }).fanfare.lastEventId, 0);
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
      return [word, delay ?? heard("error").flatMap(({ code, message }) => [code, message])];
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
    for (const code of [1002, 1003, 1007, 4003, 4010, 4400, 4403])
      equal(await after(code), ["closed", [code, "why"]]);
    for (const code of [4001, 4401]) {
      equal(await after(code), ["closed", [code, "why"]]);
      equal(await after(code, { token: "fixed" }), ["closed", [code, "why"]]);
      equal(await after(code, { token: () => "fresh" }), ["waiting", 500]);
    }
    const refused = client();
    await settle();
    refused.last().ends(4400, "no such parameter");
    equal(refused.heard("error").map(({ code, message }) => [code, message]), [[4400, "no such parameter"]]);
    equal(refused.state(), { state: "closed", code: 4400, reason: "no such parameter" });
  },

  async rejected_tokens_are_renewed_twice() {
    let count = 0;
    const { last, live, state, heard } = client({ token: async () => `t${++count}` });
    await live();
    equal(last().url.searchParams.get("token"), "t1");
    await pass(11_000);
    last().ends(4001);
    await pass(500);
    equal(last().url.searchParams.get("token"), "t2");
    last().ends(4401, "expired");
    equal(state().delay, 1_000);
    await pass(1_000);
    last().ends(1006); // between them
    await pass(2_000);
    equal([last().url.searchParams.get("token"), heard("error")], ["t4", []]);
    last().ends(4401, "expired");
    equal([state().state, count, heard("error").map(({ code }) => code)], ["closed", 4, [4401]]);
  },

  async failed_attempts_are_reported() {
    const { last, live, heard, state } = client();
    const fail = async (reason) => {
      await settle();
      last().ends(1006, reason);
      await pass(state().delay);
    };
    await fail();
    await fail();
    equal(heard("error"), []);
    for (let attempt = 3; attempt < 9; attempt++) await fail("refused");
    equal(heard("error").map(({ code, message }) => [code, message]), [["unreachable", "no connection after 3 attempts " +
      "(1006, refused): check the URL, that the server runs and allows this origin, and the token"]]);
    await live();
    for (let loss = 0; loss < 3; loss++) await fail(); // the first was a connection
    equal(heard("error").length, 1);
    await fail();
    equal(heard("error").length, 2);
    await live();
    for (let loss = 0; loss < 3; loss++) await fail();
    await settle();
    last().ends(1008, "no policy allows this"); // no message was sent that could be the cause
    equal(heard("error").slice(2).map(({ code }) => code), ["unreachable"]);
  },

  async undefined_options_have_defaults() {
    const given = { gapDelay: undefined, pingInterval: undefined, pongTimeout: undefined };
    const { last, live, state, heard } = client(given);
    await live();
    last().says({ type: "reset", lastEventId: 200 });
    await pass(1_499);
    equal(heard("gap"), []);
    await pass(1);
    equal(heard("gap").length, 1);
    await pass(28_499);
    equal(last().sent, []);
    await pass(1);
    equal(last().sent, [{ type: "ping" }]);
    await pass(9_999);
    equal(state().state, "live");
    await pass(1);
    equal(state().state, "waiting");
    const unset = client({ gapDelay: Number("none") });
    await unset.live();
    unset.last().says({ type: "reset", lastEventId: 200 });
    equal(unset.heard("gap").length, 1);
  },

  async an_error_before_the_connection_ends_an_attempt() {
    const { last, live, state } = client();
    await settle();
    const first = last();
    first.close = () => first.fails("closed before it was open"); // as Node 22 does
    first.fails("refused");
    equal([state().state, state().code, state().reason, state().delay], ["waiting", 1006, "refused", 500]);
    first.ends(1006);
    await pass(500);
    equal([state().state, sockets.length], ["connecting", 2]);
    await live();
    last().fails("then it closes");
    equal(state().state, "live");
    last().ends(4008, "why");
    equal([state().state, state().code], ["waiting", 4008]);
  },

  async its_web_socket_is_an_option() {
    class Other extends FakeSocket {}
    const a = client({ WebSocket: Other });
    await settle();
    equal(a.last() instanceof Other, true);
    globalThis.WebSocket = undefined;
    let thrown;
    try { client(); } catch (error) { thrown = error; }
    globalThis.WebSocket = FakeSocket;
    equal([thrown instanceof TypeError, thrown.message.includes("option WebSocket")], [true, true]);
  },

  async a_failed_token_function_is_called_again() {
    let works = false;
    const token = async () => { if (works) return "t"; throw new Error("no login"); };
    const { last, live, heard, state } = client({ token });
    await settle();
    equal([heard("error")[0].message, state().state, sockets.length], ["no login", "waiting", 0]);
    await pass(10_000); // which is no reason to check the URL
    equal(new Set(heard("error").map(({ message }) => message)).size, 1);
    works = true;
    for (let attempt = 0; attempt < 3; attempt++) {
      await pass(state().delay);
      last().ends(1006);
    }
    equal(heard("error").at(-1).code, "unreachable");
    await pass(state().delay);
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
});
