// Events, gaps, sending and handlers. See fakes.js.

return run({
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
    const { fanfare, last, live, heard } = client({ lastEventId: 500, gapDelay: 0 });
    await live(200, 200, false); // ids may only be lower after a gap
    equal(heard("gap"), [{ lastEventId: 200, from: "welcome" }]);
    last().says({ text: "a", id: 201 });
    last().says({ type: "reset", lastEventId: 50 });
    last().says({ text: "b", id: 51 });
    equal(heard("gap")[1], { lastEventId: 50, from: "reset" });
    equal([heard("message").length, fanfare.lastEventId, heard("recovered")], [2, 51, []]);
  },

  async its_id_goes_back_only_with_a_gap() {
    const { fanfare, last, live, heard } = client({ gapDelay: 0 });
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

  async gaps_are_spread_over_a_delay() {
    const { fanfare, last, live, heard } = client();
    await live(100);
    last().says({ type: "reset", lastEventId: 200 });
    last().says({ text: "a", id: 201 });
    equal([heard("message").length, heard("gap"), fanfare.lastEventId], [1, [], 100]); // stored now, it repeats the gap
    await pass(1_000);
    last().sends("unreadable");
    last().ends(1006);
    await pass(499);
    equal(heard("gap"), []);
    await pass(1); // half of the maximum: random is 0.5
    equal([heard("gap"), fanfare.lastEventId], [[{ lastEventId: 201, from: "unreadable" }], 201]);
    equal(last().url.searchParams.get("lastEventId"), "201"); // the attempt continues without the gap
    await live(50, 50, false);
    equal(fanfare.lastEventId, 201);
    Math.random = () => 0; // the next gap comes at once, and this one with it
    last().says({ type: "reset", lastEventId: 60 });
    await pass(10_000);
    equal(heard("gap").slice(1), [{ lastEventId: 60, from: "reset" }]);
    Math.random = () => 0.5;
    last().says({ type: "reset", lastEventId: 300 });
    fanfare.close();
    await pass(10_000);
    equal([heard("gap").length, fanfare.lastEventId], [2, 60]);
  },

  async no_gap_follows_a_close_by_a_handler() {
    const { fanfare, live, heard } = client({ lastEventId: 500 });
    fanfare.on("state", ({ state }) => state === "live" && fanfare.close());
    await live(200, 200, false);
    await pass(10_000);
    equal([heard("gap"), fanfare.lastEventId, clock.timers.size], [[], 500, 0]);
  },

  async unreadable_frames_are_skipped() {
    const { fanfare, last, live, heard } = client({ gapDelay: 0 });
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
    equal(await outcome(fanfare.send("late")), "FanfareError offline");
    await pass(1_000);
    await live();
    last().readyState = 2; // closing: a WebSocket drops what is sent now
    equal(await outcome(fanfare.send("late")), "FanfareError offline");
    equal(last().sent, []);
  },

  async sending_waits_for_the_first_connection() {
    const { fanfare, last, live } = client();
    const sent = [fanfare.send("a"), fanfare.send({ data: 1 })].map(outcome);
    await settle();
    last().ends(1006);
    await pass(1_000);
    fanfare.on("state", ({ state }) => state === "live" && fanfare.send("c").catch(() => {}));
    await live();
    equal(last().sent, [{ text: "a", ref: 1 }, { data: 1, ref: 2 }, { text: "c", ref: 3 }]);
    last().says({ type: "ack", ref: 2, id: 102 });
    last().says({ type: "ack", ref: 1, id: 101 });
    equal(await Promise.all(sent), [101, 102]);
    last().ends(1006);
    equal(await outcome(fanfare.send("d")), "FanfareError offline");
    await pass(1_000);
    await live();
    equal(last().sent.map(({ text }) => text), ["c"]); // nothing is sent again
  },

  async few_messages_wait() {
    const many = client();
    const sent = Array.from({ length: 65 }, (_, number) => outcome(many.fanfare.send(`${number}`)));
    equal(await sent[64], "FanfareError offline");
    many.fanfare.close();
    equal(await Promise.all(sent.slice(0, 64)), Array(64).fill("FanfareError offline"));
    equal(await outcome(many.fanfare.send("closed")), "FanfareError offline");
    const long = client();
    const half = long.fanfare.send("x".repeat(128 * 1024)).catch(({ message }) => message);
    equal(await outcome(long.fanfare.send("x".repeat(128 * 1024))), "FanfareError offline");
    await settle();
    long.last().ends(4403, "no such channel for you");
    equal(await half, "not published: no such channel for you");
  },

  async messages_too_big_are_certainly_not_published() {
    const { fanfare, last, live, heard } = client();
    await live();
    // The largest in bytes of UTF-8, not in characters. What was sent before it may be published.
    const texts = ["acked".repeat(9), "a", "bbb".repeat(5), "€".repeat(9), "c".repeat(9), "€".repeat(9)];
    const sent = texts.map((text) => outcome(fanfare.send(text)));
    last().says({ type: "ack", ref: 1, id: 101 });
    last().ends(1009, "message too big");
    const [unknown, offline] = ["FanfareError unknown", "FanfareError offline"];
    equal(await Promise.all(sent), [101, unknown, unknown, "FanfareError too_big", offline, offline]);
    equal(heard("error").map(({ code, message }) => [code, message]), [[1009, "message too big"]]);
    await pass(1_000);
    await live();
    const later = outcome(fanfare.send("d"));
    last().ends(1006);
    equal(await later, unknown);
  },

  async errors_without_a_sender_are_emitted() {
    const { last, live, heard } = client();
    await live();
    last().says({ type: "error", code: "invalid", message: "no JSON" });
    last().says({ type: "ping", lastEventId: 0 });
    equal(heard("error").map(({ code, message }) => [code, message]), [["invalid", "no JSON"]]);
  },

  async errors_without_a_handler_are_logged_once() {
    const { warn } = console;
    const warnings = [];
    console.warn = (text) => warnings.push(text);
    try {
      const { fanfare, last, live } = client({}, ["message"]);
      await live();
      for (let time = 0; time < 2; time++) last().sends("unreadable");
      last().says({ type: "error", code: "invalid", message: "no JSON" });
      fanfare.on("error", () => {})();
      last().ends(4403, "not this channel");
      const heard = client();
      await heard.live();
      heard.last().ends(4403, "not this channel");
    } finally {
      console.warn = warn;
    }
    equal(warnings, [
      "fanfare: the server sent a frame that is not a JSON object (unreadable)",
      "fanfare: no JSON (invalid)",
      "fanfare: not this channel (4403)",
    ]);
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
});
