// Many channels on one connection, and tokens that are renewed on it. See fakes.js.

/** A subscription with everything it says written down. */
function follow(fanfare, channel, options) {
  const subscription = fanfare.subscribe(channel, options);
  const said = [];
  for (const name of ["message", "state", "recovered", "gap", "error"]) {
    subscription.on(name, (...values) => said.push([name, ...values]));
  }
  return {
    subscription, said,
    heard: (name) => said.filter(([kind]) => kind === name).map(([, value]) => value),
    states: () => said.filter(([kind]) => kind === "state").map(([, { state, code = "" }]) => `${state} ${code}`.trim()),
  };
}

/** Answers each channel of the last frame, as the server does for newcomers. */
async function welcome(last, at = 100, recovered = true) {
  await settle();
  const { channels, ref } = last().sent.findLast(({ type }) => type === "subscribe");
  for (const { channel, lastEventId = at } of channels) {
    last().says({ type: "welcome", channel, lastEventId, head: lastEventId, recovered, ref });
  }
}

const thrown = (action) => {
  try { action(); } catch ({ name, code, message }) { return [name, code, message]; }
};

return run({
  async channels_are_subscribed_in_one_frame() {
    const { fanfare, last, live } = client();
    const news = follow(fanfare, "news", { lastEventId: "70" });
    const room = follow(fanfare, "room.1", { history: 20 });
    equal([room.subscription.channel, room.subscription.state, room.subscription.lastEventId], ["room.1", "connecting", null]);
    equal(follow(fanfare, "kept", { lastEventId: 7, history: 20 }).subscription.lastEventId, 7);
    follow(fanfare, "broken", { lastEventId: "undefined" }); // stored by a page with a mistake
    await live();
    const channels = [
      { channel: "news", lastEventId: 70 }, { channel: "room.1", history: 20 }, { channel: "kept", lastEventId: 7 },
      { channel: "broken", lastEventId: 0 },
    ];
    equal(last().sent, [{ type: "subscribe", channels, ref: 1 }]);
    last().says({ type: "welcome", channel: "room.1", lastEventId: 30, head: 50, recovered: true, ref: 1 });
    last().says({ type: "welcome", channel: "news", lastEventId: 70, head: 71, recovered: true, ref: 1 });
    for (const at of [{ channel: "news", id: 71 }, { channel: "news", id: 72 }, { channel: "room.1", id: 50 }]) {
      last().says({ channel: at.channel, text: "x", id: at.id });
    }
    equal(news.said, [
      ["state", { state: "live" }],
      ["recovered", { lastEventId: 70, head: 71 }],
      ["message", { channel: "news", text: "x", id: 71 }, { recovered: true }],
      ["message", { channel: "news", text: "x", id: 72 }, { recovered: false }],
    ]);
    equal(room.said, [["state", { state: "live" }], ["message", { channel: "room.1", text: "x", id: 50 }, { recovered: true }]]);
    fanfare.subscribe("a");
    fanfare.subscribe("b");
    await settle();
    equal(last().sent.slice(1), [{ type: "subscribe", channels: [{ channel: "a" }, { channel: "b" }], ref: 2 }]);
  },

  async presence_is_a_list_with_changes() {
    const { fanfare, last, live } = client({ presence: true }, []);
    const [said, room] = [[], fanfare.subscribe("room", { history: 1, presence: true })];
    fanfare.on("presence", (info) => said.push(info));
    room.on("presence", (info) => said.push(info));
    await live();
    equal(last().url.searchParams.get("presence"), "1");
    equal(last().sent[0].channels, [{ channel: "room", history: 1, presence: true }]);
    last().says({ type: "presence", channel: "room", users: ["early"], count: 1 });
    await welcome(last);
    last().says({ type: "presence", users: ["a", "b"], count: 2 });
    last().says({ type: "presence", join: ["c"], leave: ["a"], count: 2 });
    last().says({ type: "presence", channel: "room", join: ["lost"], leave: [], count: 1 });
    last().says({ type: "presence", channel: "room", count: 1001 });
    equal(said, [
      { users: ["a", "b"], count: 2, joined: [], left: [] },
      { users: ["b", "c"], count: 2, joined: ["c"], left: ["a"] },
      { users: null, count: 1001, joined: [], left: [] },
    ]);
    last().ends(1006);
    await pass(1_000);
    await live();
    await welcome(last);
    equal(last().sent[0].channels, [{ channel: "room", lastEventId: 100, presence: true }]);
    last().says({ type: "presence", users: ["c", "d"], count: 2 });
    last().says({ type: "presence", channel: "room", users: ["e"], count: 1 });
    equal(said.slice(3), [
      { users: ["c", "d"], count: 2, joined: ["d"], left: ["b"] },
      { users: ["e"], count: 1, joined: [], left: [] },
    ]);
  },

  async many_channels_take_several_frames() {
    const { fanfare, last, live } = client();
    for (let number = 0; number < 201; number++) fanfare.subscribe(`room.${number}`);
    await live();
    equal(last().sent.map(({ channels, ref }) => [channels.length, ref]), [[100, 1], [100, 2], [1, 3]]);
  },

  async events_reach_their_subscription_alone() {
    const { fanfare, said, last, live, heard } = client();
    const [a, b] = [follow(fanfare, "a"), follow(fanfare, "b")];
    await live(100);
    last().says({ channel: "a", text: "before the welcome", id: 90 });
    await welcome(last);
    const before = said.length;
    for (const id of [101, 103, 103, 102, 104]) last().says({ channel: "a", text: "x", id });
    last().says({ channel: "a", text: "raw" });
    last().says({ channel: "b", text: "y", id: 101 });
    equal(a.heard("message").map(({ id }) => id), [101, 103, 104, undefined]);
    equal(b.heard("message").map(({ text }) => text), ["y"]);
    equal([said.length, fanfare.lastEventId, a.subscription.lastEventId], [before, 100, 104]);
    last().sends('{ "channel":"a","text":"a backend\'s own member","id":105}');
    last().says({ text: "own", channel: { of: 1 }, id: 106 });
    last().says({ channel: "c", text: "of a subscription that has ended", id: 200 });
    equal([heard("message").length, fanfare.lastEventId], [2, 106]);
    last().says({ type: "ping", lastEventId: 110, channels: { a: 120, b: 90, c: 500 } });
    equal([fanfare.lastEventId, a.subscription.lastEventId, b.subscription.lastEventId], [110, 120, 101]);
  },

  async one_frame_resumes_them_all() {
    const { fanfare, last, live } = client();
    const [a, b] = [follow(fanfare, "a"), follow(fanfare, "b", { history: 5 })];
    await live();
    await welcome(last);
    last().says({ channel: "a", text: "x", id: 101 });
    last().ends(1006, "lost");
    equal([a.subscription.state, b.subscription.state], ["waiting", "waiting"]);
    equal(a.said.at(-1), ["state", { state: "waiting", delay: 500, code: 1006, reason: "lost" }]);
    const late = follow(fanfare, "late");
    equal(late.subscription.state, "waiting");
    await pass(500);
    equal([a.subscription.state, late.subscription.state], ["connecting", "connecting"]);
    await live();
    const channels = [{ channel: "a", lastEventId: 101 }, { channel: "b", lastEventId: 100 }, { channel: "late" }];
    equal(last().sent, [{ type: "subscribe", channels, ref: 2 }]);
    last().says({ type: "welcome", channel: "a", lastEventId: 101, head: 102, recovered: true, ref: 2 });
    last().says({ channel: "a", text: "x", id: 102 });
    equal(a.said.slice(-3), [
      ["state", { state: "live" }],
      ["recovered", { lastEventId: 101, head: 102 }],
      ["message", { channel: "a", text: "x", id: 102 }, { recovered: true }],
    ]);
    equal([a.states(), late.states()], [["live", "waiting 1006", "connecting", "live"], ["connecting"]]);
  },

  async each_has_its_own_gaps() {
    const { fanfare, last, live, heard } = client();
    const [a, b] = [follow(fanfare, "a", { lastEventId: 70 }), follow(fanfare, "b", { lastEventId: 70 })];
    await live();
    await settle();
    last().says({ type: "welcome", channel: "a", lastEventId: 200, head: 200, recovered: false, ref: 1 });
    last().says({ type: "welcome", channel: "b", lastEventId: 70, head: 70, recovered: true, ref: 1 });
    last().says({ channel: "a", text: "x", id: 201 });
    equal([a.heard("gap"), a.heard("message").length, a.subscription.lastEventId], [[], 1, 70]);
    await pass(1_500);
    equal([a.heard("gap"), a.subscription.lastEventId], [[{ lastEventId: 201, from: "welcome" }], 201]);
    last().says({ type: "reset", channel: "a", lastEventId: 50 });
    last().sends('{"channel":"b","x":1.,"id":80}');
    await pass(1_500);
    equal([a.heard("gap")[1], b.heard("gap")], [{ lastEventId: 50, from: "reset" }, [{ lastEventId: 80, from: "unreadable" }]]);
    equal([b.heard("error").map(({ code }) => code), heard("error"), heard("gap")], [["unreadable"], [], []]);
    last().says({ type: "reset", channel: "a", lastEventId: 60 });
    a.subscription.close();
    await pass(1_500);
    equal([a.heard("gap").length, a.subscription.lastEventId], [2, 50]);
  },

  async messages_carry_the_channel() {
    const { fanfare, last, live } = client();
    const { subscription } = follow(fanfare, "a");
    const early = [outcome(subscription.send("early")), outcome(fanfare.send("default"))];
    await live();
    await settle();
    equal(last().sent.map(({ text, type }) => text ?? type), ["default", "subscribe"]);
    await welcome(last); // so that it gets its own message
    equal(last().sent[2], { text: "early", channel: "a", ref: 1 });
    last().says({ type: "ack", ref: 1, id: 101 });
    last().says({ type: "ack", ref: 2, id: 501 });
    equal(await Promise.all(early), [101, 501]);
    const later = [{ data: 1, to: "bob" }, { text: "x", channel: "other" }].map((message) => outcome(subscription.send(message)));
    fanfare.send({ text: "x", channel: "other" }).catch(() => {});
    equal(last().sent.slice(3).map(({ ref, ...message }) => message),
      [{ data: 1, to: "bob", channel: "a" }, { text: "x", channel: "a" }, { text: "x", channel: "other" }]);
    last().says({ type: "error", code: "forbidden", message: "no", channel: "a", ref: 4 });
    last().ends(1006);
    equal(await Promise.all(later), ["FanfareError forbidden", "FanfareError unknown"]);
    equal(await outcome(subscription.send("x")), "FanfareError offline");
    await pass(500);
    await live();
    const resuming = outcome(subscription.send("x")); // which needs no subscription
    equal(last().sent.at(-1).text, "x");
    subscription.close();
    last().says({ type: "ack", ref: last().sent.at(-1).ref, id: 600 });
    equal([await resuming, await outcome(subscription.send("x"))], [600, "FanfareError offline"]);
  },

  async messages_wait_across_connections() {
    const { fanfare, last, live } = client();
    const { subscription } = follow(fanfare, "a");
    await live();
    for (let number = 0; number < 65; number++) fanfare.send("unanswered, but sent").catch(() => {});
    const sent = Array.from({ length: 65 }, (_, number) =>
      subscription.send(`${number}`).catch(({ code, message }) => `${code}: ${message}`));
    equal(await sent[64], "offline: not sent, too many messages wait for the first connection");
    last().ends(1006);
    await pass(500);
    await live();
    await settle();
    const { ref } = last().sent[0];
    last().says({ type: "error", code: "forbidden", message: "not you", channel: "a", ref });
    equal(await Promise.all(sent.slice(0, 64)), Array(64).fill("offline: not published: not you"));
    equal(last().sent.length, 1);
  },

  async final_refusals_end_a_subscription() {
    const { fanfare, last, live, heard } = client();
    for (const code of ["forbidden", "too_many", "invalid"]) {
      const refused = follow(fanfare, "a");
      const other = fanfare.subscribe(`other.${code}`);
      if (code === "forbidden") await live();
      await settle();
      last().says({ type: "error", code, message: "why", channel: "a", ref: last().sent.at(-1).ref });
      equal(refused.said, [["state", { state: "closed", code, reason: "why" }], ["error", { name: "FanfareError", code }]]);
      equal([refused.subscription.state, other.state], ["closed", "connecting"]);
      refused.subscription.close();
    }
    equal(heard("error"), []);
    last().ends(1006);
    await pass(500);
    await live();
    await settle();
    equal(last().sent[0].channels.map(({ channel }) => channel.split(".")[0]), Array(3).fill("other"));
  },

  async temporary_refusals_are_retried_together() {
    const { fanfare, last, live } = client();
    const [a, b, c] = ["a", "b", "c"].map((channel) => follow(fanfare, channel));
    await live();
    await settle();
    const refuse = async (delay, code = "unavailable") => {
      const { ref, channels } = last().sent.at(-1);
      for (const { channel } of channels) last().says({ type: "error", code, message: "later", channel, ref });
      equal(a.said.findLast(([name]) => name === "state")[1], { state: "waiting", delay, code, reason: "later" });
      const count = last().sent.length;
      await pass(delay - 1);
      equal(last().sent.length, count);
      await pass(1);
      equal([last().sent.length, last().sent.at(-1).channels, a.subscription.state],
        [count + 1, [{ channel: "a" }, { channel: "b" }], "connecting"]);
    };
    last().says({ type: "welcome", channel: "c", lastEventId: 1, head: 1, recovered: true, ref: 1 });
    last().says({ type: "error", code: "unavailable", message: "later", channel: "b", ref: 1 });
    await pass(100);
    last().says({ type: "error", code: "unavailable", message: "later", channel: "a", ref: 1 });
    equal([a, b].map(({ said }) => said.at(-1)[1].delay), [400, 500]);
    await pass(400);
    for (const delay of [1_000, 2_000, 4_000, 8_000, 15_000, 15_000]) await refuse(delay, delay > 2_000 ? "rate_limited" : "unavailable");
    equal([a, b].map(({ heard }) => heard("error").map(({ code }) => code)), [["unavailable"], ["unavailable"]]);
    await welcome(last);
    equal([a.subscription.state, c.states()], ["live", ["live"]]);
    // A lost connection ends the wait, an answer the growth of the delay.
    fanfare.subscribe("d");
    await settle();
    last().says({ type: "error", code: "rate_limited", message: "slow down", ref: last().sent.at(-1).ref });
    last().ends(1006);
    await pass(500);
    await live();
    await settle();
    equal(last().sent.map(({ channels }) => channels.length), [4]);
    last().says({ type: "error", code: "rate_limited", message: "slow down", ref: last().sent.at(-1).ref });
    equal([a.said.at(-1)[1].delay, c.said.at(-1)[1].delay], [500, 500]);
    fanfare.close();
    equal(clock.timers.size, 0);
  },

  async one_wrong_channel_hinders_no_other() {
    const { fanfare, last, live } = client();
    const subscriptions = ["good", "two words", "better"].map((channel) => follow(fanfare, channel));
    await live();
    await settle();
    last().says({ type: "error", code: "invalid", message: "channel must be", ref: 1 });
    equal(last().sent.slice(1).map(({ channels }) => channels.map(({ channel }) => channel)), [["good"], ["two words"], ["better"]]);
    last().says({ type: "error", code: "invalid", message: "channel must be", ref: 3 });
    for (const ref of [2, 4]) {
      const [{ channel }] = last().sent[ref - 1].channels;
      last().says({ type: "welcome", channel, lastEventId: 1, head: 1, recovered: true, ref });
    }
    equal(subscriptions.map(({ subscription }) => subscription.state), ["live", "closed", "live"]);
  },

  async closing_unsubscribes() {
    const { fanfare, said, last, live } = client();
    const a = follow(fanfare, "a");
    await live();
    await welcome(last);
    const before = said.length;
    a.subscription.close();
    a.subscription.close();
    await settle();
    equal(last().sent.slice(1), [{ type: "unsubscribe", channel: "a", ref: 2 }]);
    last().says({ channel: "a", text: "still under way", id: 101 });
    last().says({ type: "reset", channel: "a", lastEventId: 90 });
    last().says({ type: "error", code: "rate_limited", message: "slow down", channel: "a", ref: 2 });
    await pass(500);
    equal(last().sent.slice(2), [{ type: "unsubscribe", channel: "a", ref: 3 }]);
    last().says({ type: "unsubscribed", channel: "a", reason: "requested", ref: 3 });
    equal([a.states(), a.heard("message"), a.subscription.lastEventId], [["live", "closed 1000"], [], 100]);
    equal(said.length, before);
    const [offline, lost] = [follow(fanfare, "b"), follow(fanfare, "c")];
    await settle();
    lost.subscription.close();
    await settle();
    last().ends(1006); // before the answer
    offline.subscription.close();
    await pass(500);
    await live();
    await settle();
    equal(last().sent, []);
  },

  async a_channel_can_be_followed_again() {
    const { fanfare, last, live } = client();
    const first = follow(fanfare, "a");
    await live();
    await welcome(last);
    first.subscription.close();
    const second = follow(fanfare, "a", { history: 3 });
    await settle();
    equal(last().sent.slice(1), [{ type: "unsubscribe", channel: "a", ref: 2 }]); // twice would be an error
    last().says({ channel: "a", text: "for the first", id: 101 });
    last().says({ type: "unsubscribed", channel: "a", reason: "requested", ref: 2 });
    equal(last().sent.slice(2), [{ type: "subscribe", channels: [{ channel: "a", history: 3 }], ref: 3 }]);
    second.subscription.close(); // the subscribe is under way
    const third = follow(fanfare, "a");
    last().says({ type: "welcome", channel: "a", lastEventId: 98, head: 101, recovered: true, ref: 3 });
    last().says({ channel: "a", text: "for the second", id: 101 });
    await settle();
    equal(last().sent.slice(3), [{ type: "unsubscribe", channel: "a", ref: 4 }]);
    last().says({ type: "error", code: "not_subscribed", message: "never", channel: "a", ref: 4 });
    equal(last().sent.slice(4), [{ type: "subscribe", channels: [{ channel: "a" }], ref: 5 }]);
    third.subscription.close();
    last().says({ type: "error", code: "unavailable", message: "an earlier answer", channel: "a", ref: 5 });
    await settle();
    last().says({ type: "unsubscribed", channel: "a", reason: "requested", ref: 6 });
    equal([first, second, third].map(({ states, heard }) => [states(), heard("message"), heard("error")]),
      [[["live", "closed 1000"], [], []], [["closed 1000"], [], []], [["closed 1000"], [], []]]);
    await pass(20_000);
    equal(last().sent.length, 6);
  },

  async wrong_subscribes_throw() {
    const other = client({ channel: "lobby" }).fanfare;
    other.subscribe("ws_broadcast");
    equal(thrown(() => other.subscribe("lobby"))[1], "subscribed"); // the default channel
    const { fanfare, last, live } = client();
    equal(thrown(() => fanfare.subscribe("ws_broadcast"))[1], "subscribed");
    fanfare.subscribe("a");
    equal(thrown(() => fanfare.subscribe("a")), ["FanfareError", "subscribed", "already subscribed to a"]);
    await live();
    last().ends(4403, "not you");
    equal(thrown(() => fanfare.subscribe("b")),
      ["FanfareError", "closed", "not subscribed, the client is closed: create a new one"]);
  },

  async subscriptions_end_with_their_client() {
    for (const code of [1000, 4403]) {
      const { fanfare, last, live } = client();
      const subscriptions = ["a", "b"].map((channel) => follow(fanfare, channel));
      await live();
      const waiting = outcome(subscriptions[0].subscription.send("x"));
      if (code === 1000) fanfare.close();
      else last().ends(code, "not you");
      equal(await waiting, "FanfareError offline");
      equal(subscriptions.map(({ states, heard }) => [states(), heard("error")]), Array(2).fill([[`closed ${code}`], []]));
      equal(clock.timers.size, 0);
    }
  },

  async a_client_may_have_no_default_channel() {
    for (const channel of [null, ""]) {
      const { fanfare, said, last } = client({ channel });
      const a = follow(fanfare, "a");
      await settle();
      equal(last().url.search, "?channel=&lastEventId=");
      last().says({ type: "welcome" });
      await welcome(last);
      last().says({ type: "ping", channels: { a: 150 } });
      last().sends("unreadable");
      equal(said.filter(([name]) => name !== "error"), [["state", { state: "connecting" }], ["state", { state: "live" }]]);
      equal([fanfare.lastEventId, a.subscription.lastEventId], [null, 150]);
      last().ends(1006);
      await pass(500);
      equal(last().url.search, "?channel=&lastEventId=");
      last().says({ type: "welcome" });
      equal(said.slice(-2).map(([, { state }]) => state), ["connecting", "live"]); // no gap, nothing recovered
      equal(last().sent, [{ type: "subscribe", channels: [{ channel: "a", lastEventId: 150 }], ref: 2 }]);
    }
  },

  async a_token_that_loses_a_channel_ends_its_subscription() {
    const { fanfare, last, live, heard } = client();
    const [a, b] = [follow(fanfare, "a"), follow(fanfare, "b")];
    await live();
    await welcome(last);
    last().says({ type: "unsubscribed", channel: "a", reason: "forbidden" });
    equal(a.states(), ["live", "closed forbidden"]);
    equal([a.heard("error").map(({ code }) => code), b.subscription.state, heard("error")], [["forbidden"], "live", []]);
    a.subscription.close();
    await settle();
    equal(last().sent.length, 1);
    fanfare.subscribe("a");
    await settle();
    equal(last().sent.map(({ type }) => type), ["subscribe", "subscribe"]);
  },

  async a_backend_ends_a_subscription() {
    const { fanfare, last, live, heard } = client();
    const [a, b] = [follow(fanfare, "a"), follow(fanfare, "b")];
    await live();
    await welcome(last);
    last().says({ type: "unsubscribed", channel: "a", reason: "disconnected" });
    equal(a.states(), ["live", "closed disconnected"]);
    equal(a.heard("error").map(({ message }) => message), ["disconnected by the application"]);
    equal([b.subscription.state, heard("error")], ["live", []]);
  },

  async tokens_are_renewed_on_the_connection() {
    let count = 0;
    let works = true;
    const token = async () => { if (works) return `t${++count}`; throw new Error("no login"); };
    const { last, live, state, heard } = client({ token, pingInterval: 1_000_000 });
    await live();
    for (const [random, delay] of [[0, 15_000], [0.5, 30_000], [0.999, 44_970]]) {
      Math.random = () => random;
      last().sent.length = 0;
      for (let time = 0; time < 2; time++) last().says({ type: "token_expiring", in: 60 });
      await pass(delay - 1);
      equal(last().sent, []);
      await pass(1);
      equal(last().sent, [{ type: "token", token: `t${count}` }]);
    }
    equal([count, sockets.length, state().state], [4, 1, "live"]);
    last().says({ type: "error", code: "unauthorized", message: "of another user" });
    works = false;
    last().says({ type: "token_expiring", in: 1 });
    await pass(1_000);
    equal(heard("error").map(({ message }) => message), ["of another user", "no login"]);
    works = true;
    last().says({ type: "token_expiring", in: 60 });
    last().ends(4001); // the next attempt gets a new one in any case
    await pass(1_000);
    await live();
    await pass(60_000);
    equal([last().url.searchParams.get("token"), last().sent, count], ["t5", [], 5]);
  },

  async a_token_can_be_replaced() {
    const { fanfare, last, live } = client({ token: "first" });
    fanfare.setToken("second");
    await live();
    equal([last().url.searchParams.get("token"), last().sent], ["second", []]);
    last().says({ type: "token_expiring", in: 1 }); // no function to call
    await pass(1_000);
    equal(last().sent, []);
    fanfare.subscribe("a");
    fanfare.setToken("third");
    await settle();
    equal(last().sent, [{ type: "token", token: "third" }, { type: "subscribe", channels: [{ channel: "a" }], ref: 1 }]);
    let give;
    fanfare.setToken(() => new Promise((resolve) => (give = resolve)));
    const lost = last();
    lost.ends(1006);
    give("late");
    await settle();
    equal(lost.sent.length, 2);
    await pass(500);
    give("fourth");
    await settle();
    equal([last().url.searchParams.get("token"), last().sent], ["fourth", []]);
    fanfare.setToken("fifth"); // too late for this attempt
    await live();
    await settle();
    equal(last().sent.map(({ token, type }) => token ?? type), ["fifth", "subscribe"]);
  },
});
