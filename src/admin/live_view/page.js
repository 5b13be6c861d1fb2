// Polls `stats` once a second while the page is visible, and shows the last five minutes.

const INTERVAL = 1_000; // ms
const SPAN = 300; // seconds shown
const MAX_SAMPLE_DISTANCE = 5; // seconds; samples further apart are not joined by a line
const REQUEST_TIMEOUT = 5_000; // ms
const STORED_KEY = "fanfare admin key"; // in sessionStorage, which ends with the tab

const select = (selector, within = document) => within.querySelector(selector);

// Formats

const digits = (options) => new Intl.NumberFormat("en", options);
const whole = digits({ maximumFractionDigits: 0 });
const short = digits({ maximumSignificantDigits: 3 });
const compact = digits({ maximumSignificantDigits: 3, notation: "compact" });

const count = (number) => (number < 100 ? short : whole).format(number);
const rate = (number) => `${count(number)}/s`;
const compactRate = (number) => `${compact.format(number)}/s`;
const percent = (ratio) => `${short.format(100 * ratio)} %`;

function seconds(number) {
  if (number < 0.001) return `${short.format(number * 1e6)} µs`;
  return number < 1 ? `${short.format(number * 1e3)} ms` : `${short.format(number)} s`;
}

function bytes(number) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log2(number || 1) / 10)));
  return `${short.format(number / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

/** The two largest units of a duration in seconds. */
function duration(number) {
  let rest = Math.round(number);
  const parts = [["d", 86_400], ["h", 3_600], ["min", 60], ["s", 1]].map(([unit, size]) => {
    const times = Math.floor(rest / size);
    rest %= size;
    return times && `${times} ${unit}`;
  });
  return parts.filter(Boolean).slice(0, 2).join(" ") || "0 s";
}

/** The upper end of a scale: the next of 1, 2, 5, 10… or of the powers of two. */
function ceiling(value, isBinary) {
  if (isBinary) return 2 ** Math.ceil(Math.log2(value));
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

// Values of two consecutive answers of `stats`. Null where one is unknown.

const sum = (numbers) => Object.values(numbers).reduce((total, number) => total + number, 0);

/** What rose per second; of `read`, a counter. */
const perSecond = (read) => (now, before) =>
  before && (read(now) - read(before)) / (now.uptime_seconds - before.uptime_seconds);

/** A quantile of the durations observed in between, as `histogram_quantile` in Prometheus. */
const quantile = (share, key) => (now, before) => {
  if (!before) return null;
  const bound = (text) => Number(text.replace("+Inf", "Infinity"));
  const buckets = Object.entries(now[key].buckets)
    .map(([text, total]) => [bound(text), total - before[key].buckets[text]])
    .sort(([a], [b]) => a - b);
  const rank = share * buckets.at(-1)[1];
  if (!(rank > 0)) return null;
  let [low, below] = [0, 0];
  for (const [high, total] of buckets) {
    if (total >= rank) return high === Infinity ? low : low + ((high - low) * (rank - below)) / (total - below);
    [low, below] = [high, total];
  }
  return null;
};

/** The mean of the durations observed in between. */
const mean = (key) => (now, before) => {
  const times = before && now[key].count - before[key].count;
  return times > 0 ? (now[key].sum - before[key].sum) / times : null;
};

const rejections = (now) => sum(now.http_rejections) + sum(now.connections_rejected);

/** `least` is the least upper end of the scale, `note` the line below. Lines are by name. */
const PLOTS = [
  {
    title: "Connections", format: count, scale: compact.format, least: 10,
    lines: { open: (now) => now.connections },
    note: (now) => `${percent(now.connections / now.max_connections)} of ${whole.format(now.max_connections)}, `
      + `${whole.format(now.slow_connections)} slow`,
  },
  {
    title: "Deliveries", format: rate, scale: compactRate, least: 1,
    lines: { events: perSecond((now) => now.events_delivered) },
    note: (now, before) => before ? `${bytes(perSecond(({ sent_bytes }) => sent_bytes)(now, before))}/s sent, `
      + `${rate(perSecond(({ bus_events }) => bus_events)(now, before))} from the bus` : "",
  },
  {
    title: "Delivery latency", format: seconds, least: 0.001,
    lines: { p50: quantile(0.5, "delivery_latency_seconds"), p99: quantile(0.99, "delivery_latency_seconds") },
    note: () => "from the arrival of an event until the last ready socket has it",
  },
  {
    title: "Closes and rejections", format: rate, scale: compactRate, least: 1,
    lines: {
      closes: perSecond((now) => sum(now.connections_closed)),
      rejections: perSecond(rejections),
    },
    note: (now, before) => before
      ? `${rate(perSecond(({ connections_upgraded }) => connections_upgraded)(now, before))} opened` : "",
  },
  {
    title: "Bus round trip", format: seconds, least: 0.001,
    lines: { mean: mean("bus_round_trip_seconds") },
    note: (now) => now.bus_round_trip_seconds.count > 0
      ? `${whole.format(now.bus_channels)} channels` : "no probe has returned; without --redis there are none",
  },
  {
    title: "Memory", format: bytes, least: 2 ** 20, isBinary: true,
    lines: { resident: (now) => now.process_resident_memory_bytes },
    note: (now) => `${bytes(now.buffer_bytes)} events, ${bytes(now.history_page_bytes)} history, `
      + `${bytes(now.unsent_bytes)} unsent`,
  },
];

const scalars = (names) => (now) => Object.fromEntries(names.map((name) => [name, now[name]]));

/** Counters by reason. */
const COUNTS = {
  "Closed connections": (now) => now.connections_closed,
  "HTTP rejections by status": (now) => now.http_rejections,
  "Rejected before the request": (now) => ({ ...now.connections_rejected, accept_failures: now.accept_failures }),
  "Messages not published, by code": (now) => now.publish_errors,
  "Events missed or not published": scalars(["resets", "bus_resets", "bus_gaps_filled", "pubsub_misses",
    "bus_publish_rejected", "bus_publish_unknown", "bus_oversized"]),
  "Admin requests": (now) => ({ rejected: now.admin_rejections }),
};

// Drawing

const svg = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);

function cell(text, kind = "td") {
  const made = document.createElement(kind);
  made.textContent = text;
  return made;
}

function copy(template, into) {
  const card = select(template).content.firstElementChild.cloneNode(true);
  select(into).append(card);
  return card;
}

class Plot {
  #plot;
  #card = copy("#plot", "#plots");
  #lines = [];
  #samples = []; // [time, a value per line]

  constructor(plot) {
    this.#plot = plot;
    select("h2", this.#card).textContent = plot.title;
    for (const [at, name] of Object.keys(plot.lines).entries()) {
      const [path, row, key] = [svg("path"), document.createElement("tr"), document.createElement("span")];
      path.setAttribute("class", at ? "second" : "first");
      key.className = at ? "key second" : "key";
      const head = cell("", "th");
      head.scope = "row";
      head.append(key, name);
      const cells = ["now", "min", "max"].map((kind) => Object.assign(cell("–"), { className: kind }));
      row.append(head, ...cells);
      select("tbody", this.#card).append(row);
      select("svg", this.#card).append(path);
      this.#lines.push({ path, cells });
    }
  }

  /** Adds a sample. `at`: seconds on the clock of this page. */
  add(at, now, before) {
    const values = Object.values(this.#plot.lines).map((read) => read(now, before) ?? null);
    this.#samples.push([at, ...values]);
    select(".note", this.#card).textContent = this.#plot.note(now, before);
  }

  draw(at) {
    while (this.#samples.length && this.#samples[0][0] < at - SPAN) this.#samples.shift();
    const { format, scale = format, least, isBinary } = this.#plot;
    const known = this.#samples.flatMap(([, ...values]) => values).filter((value) => value !== null);
    const top = ceiling(Math.max(least, ...known), isBinary);
    select(".top", this.#card).textContent = scale(top);
    for (const [index, { path, cells }] of this.#lines.entries()) {
      const points = this.#samples.map((sample) => [sample[0], sample[index + 1]]);
      const values = points.map(([, value]) => value).filter((value) => value !== null);
      const range = values.length ? [Math.min(...values), Math.max(...values)] : [null, null];
      for (const [column, value] of [points.at(-1)[1], ...range].entries()) {
        cells[column].textContent = value === null ? "–" : format(value);
      }
      path.setAttribute("d", this.#line(points, at, top));
    }
  }

  #line(points, at, top) {
    let [drawn, last] = ["", -Infinity];
    for (const [time, value] of points) {
      if (value === null) continue;
      const [x, y] = [SPAN + time - at, 100 - (100 * value) / top].map((number) => number.toFixed(2));
      // A sample between two gaps is a dot: a line without length, with its round ends.
      drawn += time - last <= MAX_SAMPLE_DISTANCE ? `L${x} ${y}` : `M${x} ${y}h0`;
      last = time;
    }
    return drawn;
  }
}

class Count {
  #card = copy("#count", "#counts");
  #read;

  constructor(title, read) {
    this.#read = read;
    select("caption", this.#card).textContent = title;
  }

  /** Shows counts since `first`, an earlier answer, and since the start. Zeros are left out. */
  show(now, first) {
    const earlier = this.#read(first);
    const rows = Object.entries(this.#read(now))
      .filter(([, total]) => total > 0)
      .map(([name, total]) => ({ name, total, recent: total - earlier[name] }))
      .sort((a, b) => b.recent - a.recent || b.total - a.total);
    select("thead", this.#card).hidden = rows.length === 0;
    select(".none", this.#card).hidden = rows.length > 0;
    select(".span", this.#card).textContent = `last ${duration(now.uptime_seconds - first.uptime_seconds)}`;
    select("tbody", this.#card).replaceChildren(...rows.map(({ name, total, recent }) => {
      const row = document.createElement("tr");
      row.append(...[name, whole.format(recent), whole.format(total)].map((text) => cell(text)));
      return row;
    }));
  }
}

// Polling

const plots = PLOTS.map((plot) => new Plot(plot));
const counts = Object.entries(COUNTS).map(([title, read]) => new Count(title, read));
const form = select("#access");
let key = sessionStorage.getItem(STORED_KEY);
let before; // the answer before, if it came from the same process just now
let answers = []; // [time, answer] of the last five minutes and of the same process
let isFetching = false;
let isStopped = false; // until the user acts
let timer;

/** Shows a state. Unchanged text is not announced again. */
function show(state, title, text = "") {
  document.body.dataset.state = state;
  document.title = `${title} – ${location.host}`;
  const [strong, span] = select("#state").children;
  if (strong.textContent !== title) strong.textContent = title;
  if (span.textContent !== text) span.textContent = text;
  form.hidden = state !== "locked";
  select("#forget").hidden = !key || state === "locked";
}

/** Stops until the user acts. */
function stop(...shown) {
  isStopped = true;
  show(...shown);
}

function lock(text) {
  key = null;
  sessionStorage.removeItem(STORED_KEY);
  stop("locked", "Admin key needed", text);
  select("#key").focus();
}

function accept(now) {
  const at = performance.now() / 1_000;
  if (answers.length && answers.at(-1)[1].process_start_time_seconds !== now.process_start_time_seconds) {
    [before, answers] = [undefined, []]; // counters start again
  }
  answers.push([at, now]);
  while (answers[0][0] < at - SPAN) answers.shift();
  for (const plot of plots) {
    plot.add(at, now, before);
    plot.draw(at);
  }
  for (const counter of counts) counter.show(now, answers[0][1]);
  const shards = `${now.shards.length} ${now.shards.length === 1 ? "shard" : "shards"}`;
  const facts = [`version ${now.version}`, `up ${duration(now.uptime_seconds)}`, shards];
  if (before) facts.push(`CPU ${percent(perSecond((stats) => stats.process_cpu_seconds)(now, before))}`);
  facts.push(`${whole.format(now.process_open_fds)} of ${whole.format(now.process_max_fds)} descriptors`);
  select("#facts").textContent = facts.join(" · ");
  if (now.ready) show("ready", "Ready");
  else show("not-ready", "Not ready", now.not_ready_reason);
  before = now;
}

/** The node has not answered, or not with stats. */
function fail(text) {
  before = undefined;
  if (document.body.dataset.state === "unreachable") return;
  const time = new Date().toLocaleTimeString("en-GB");
  show("unreachable", "Unreachable", `since ${time}: ${text}. ${answers.length ? "Below are the last numbers." : ""}`);
}

async function fetchStats() {
  const used = key;
  let response, body, problem;
  try {
    const headers = used ? { Authorization: `Bearer ${used}` } : {};
    const signal = AbortSignal.timeout(REQUEST_TIMEOUT);
    response = await fetch("stats", { headers, signal, cache: "no-store", redirect: "error" });
    body = await response.text();
  } catch (error) {
    problem = error.name === "TimeoutError" ? "no answer within 5 s" : "no connection";
  }
  if (isStopped || used !== key) return undefined; // the key was forgotten or replaced meanwhile
  if (problem) return fail(problem);
  if (response.status === 401) return lock(key ? "the given key is wrong" : "the node was started with --admin-key");
  if (response.status === 403) return stop("refused", "Refused", `${body.trim()}. Reload the page to try again.`);
  try {
    if (response.ok) return accept(JSON.parse(body));
  } catch (error) {
    console.error(error);
  }
  return fail(`the answer was ${response.status} ${response.statusText}`);
}

async function poll() {
  clearTimeout(timer);
  if (isFetching || isStopped || document.hidden) return;
  isFetching = true;
  const start = performance.now();
  await fetchStats();
  isFetching = false;
  if (!isStopped && !document.hidden) timer = setTimeout(poll, Math.max(100, start + INTERVAL - performance.now()));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const field = select("#key");
  const given = field.value.trim();
  field.value = "";
  if (!/^[!-~]+$/.test(given)) return lock("a key has only ASCII letters, digits and symbols");
  key = given;
  sessionStorage.setItem(STORED_KEY, key);
  isStopped = false;
  poll();
});

select("#forget").addEventListener("click", () => lock("the key is forgotten"));

document.addEventListener("visibilitychange", () => {
  before = undefined; // a rate over the time between would be drawn as one of this second
  poll();
});

select("#host").textContent = location.host;
if ("needsKey" in document.body.dataset && !key) lock("the node was started with --admin-key");
else poll();
