// The demo page: two panes, each with one user's connection to the same channel.
// The URL sets the fields: channel=NAME, left=HOST:PORT, leftUser=NAME, right=HOST:PORT, rightUser=NAME.
import { Fanfare } from "./fanfare.js";

const CUT = 10; // seconds that a cut connection stays closed, to write something meanwhile
const ROWS = 500; // rows kept in a pane
const READY_INTERVAL = 5_000; // ms between requests for /readyz
const TOKEN_REJECTED = new Set([4001, 4401]); // close codes: expired; missing or invalid

const WORDS = { connecting: "connecting", live: "live", waiting: "not connected", closed: "not connected", cut: "cut" };

// The URL holds the fields that differ from these defaults, for reloads and links. Tokens stay out of it.
const DEFAULTS = {
  channel: "ws_broadcast",
  left: location.host,
  leftUser: "alice",
  right: location.host,
  rightUser: "bob",
};
const given = new URLSearchParams(location.search);
const fields = new Map();

/** Fills a field from the URL. */
function fill(name, input) {
  input.value = given.get(name) || DEFAULTS[name];
  fields.set(name, input);
}

function updateUrl() {
  const query = new URLSearchParams();
  for (const [name, { value }] of fields) if (value !== DEFAULTS[name]) query.set(name, value);
  history.replaceState(null, "", `${location.pathname}?${query}`.replace(/\?$/, ""));
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Text that screen readers skip, since reading ids aloud takes longer than the events. */
function hiddenFromScreenReaders(className, text) {
  const made = element("span", className, text);
  made.setAttribute("aria-hidden", "true");
  return made;
}

/** A word of a shell command: names come from links, and people copy the command. */
const shellWord = (text) => (/^[\w.@:+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

class Pane {
  #fanfare = null;
  #host; // of the connection; a link may say `127.0.0.1:8080@other.example`
  #position = null; // the last id, kept over connections
  #resumed = null; // the notice with the number of recovered events
  #dividedFor = null; // the user and node of the last divider
  #outcomeShown = false; // whether this connection has been live, or a notice says why not
  #until = 0; // when the countdown ends
  #ticking;

  constructor(name) {
    const section = document.querySelector("#pane").content.cloneNode(true).firstElementChild;
    this.part = (selector) => section.querySelector(selector);
    this.section = section;
    section.id = name;
    section.setAttribute("aria-label", `${name} pane`);
    fill(name, this.part(".node"));
    fill(`${name}User`, this.part(".user"));
    for (const field of [".user", ".node"]) {
      this.part(field).addEventListener("change", (event) => {
        if (!event.target.reportValidity()) return;
        updateUrl();
        this.connect();
      });
    }
    this.part(".token").addEventListener("change", () => this.#reconnect());
    // A token is for one node, and a link can name any. Cleared at each input: a reconnect may come before the change.
    this.part(".node").addEventListener("input", () => (this.part(".token").value = ""));
    this.part("form").addEventListener("submit", (event) => this.#submit(event));
    this.part(".cut").addEventListener("click", () => this.#toggle());
    document.querySelector("#panes").append(section);
    this.connect();
  }

  /** Starts anew, as for another channel. */
  restart() {
    this.part(".events").replaceChildren();
    this.#dividedFor = null;
    this.connect();
  }

  get user() { return this.part(".user").value; }
  get node() { return this.part(".node").value; }

  /** Opens a new connection, which resumes after this id if there is one. */
  connect(lastEventId = null) {
    this.#fanfare?.close();
    this.#position = lastEventId;
    this.#resumed = null;
    this.#outcomeShown = false;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const url = `${scheme}://${this.node}/ws/${encodeURIComponent(this.user)}`;
    const token = this.part(".token").value.trim();
    this.part(".token").removeAttribute("aria-invalid");
    this.part(".events").setAttribute("aria-label", `Messages to ${this.user}`);
    let fanfare;
    try {
      fanfare = this.#fanfare = new Fanfare(url, { channel: channel.value, lastEventId, token, gapDelay: 0 });
      this.#host = new URL(url).host;
    } catch {
      this.#fanfare = null;
      this.#show("closed");
      return this.#notice(`Cannot connect to ${url}`, "bad");
    }
    const listen = (name, handler) => fanfare.on(name, (...values) => {
      if (fanfare !== this.#fanfare) return; // from an earlier connection
      this.#position = fanfare.lastEventId;
      this.part(".position").textContent = this.#position ?? "none yet";
      handler(...values);
    });
    listen("state", (change) => this.#changed(change));
    listen("message", (event, { recovered }) => this.#event(event, recovered));
    listen("recovered", ({ lastEventId }) => {
      this.#resumed = { count: 0, row: this.#notice("", "good"), lastEventId };
      this.#recount();
    });
    const gaps = { welcome: "Not recovered", reset: "Reset", unreadable: "Skipped an event" };
    listen("gap", ({ from }) => this.#notice(
      `${gaps[from]}: events may be missing above. A real page would reload its state now.`, "bad"));
    listen("error", ({ code, message }) => {
      if (TOKEN_REJECTED.has(code)) this.#askForToken(message);
      else if (fanfare.state === "closed") this.#notice(`Not connected (${code}): ${message}`, "bad");
      else if (code !== "unreachable") this.#notice(message, "bad"); // shown after the first attempt
    });
  }

  #askForToken(reason) {
    this.part(".token").setAttribute("aria-invalid", "true");
    const isOther = this.#host !== location.host;
    const server = isOther ? this.#host : "This server";
    const problem = this.part(".token").value ? `does not accept this token (${reason})` : "needs a token";
    const command = `fanfare token --user ${shellWord(this.user)} --jwt-key FILE`;
    const warning = isOther ? ` It will be sent to ${this.#host}, which is not this node.` : "";
    const advice = `paste one for ${this.user} above.${warning} Create it with the server's key file: `;
    this.#notice([`${server} ${problem}: ${advice}`, element("code", "", command)], "bad");
  }

  #changed({ state, delay, code, reason }) {
    const before = this.section.dataset.state;
    this.#show(state, delay);
    if (state === "waiting" && before === "live") {
      this.#notice(`Connection lost (${reason ? `${code}, ${reason}` : code})`);
    }
    if (state === "waiting" && !this.#outcomeShown) {
      const why = reason || "nothing answers there, or it has too many connections";
      this.#notice(`Not connected to ${this.node} (${code}): ${why}. Trying again.`, "bad");
    }
    if (state === "waiting" || state === "live") this.#outcomeShown = true;
    if (state === "live") this.#divide();
  }

  /** Separates the events of one user and node from those of the next. */
  #divide() {
    const connection = `${this.user} on ${this.node}`;
    if (this.#dividedFor !== connection) this.#notice(`Connected as ${this.user}`, "divider");
    this.#dividedFor = connection;
  }

  /** Shows a state, with a countdown if its end is known. */
  #show(state, delay) {
    this.section.dataset.state = state;
    this.part(".state").textContent = WORDS[state];
    this.part(".send").disabled = state !== "live";
    this.part(".cut").textContent = this.#isOpen() ? "Cut the connection" : "Reconnect now";
    this.#until = delay ? Date.now() + delay : 0;
    clearInterval(this.#ticking);
    const tick = () => {
      const rest = Math.max(0, Math.ceil((this.#until - Date.now()) / 1000));
      const what = state === "cut" ? "back" : "retry";
      this.part(".countdown").textContent = this.#until ? `, ${what} in ${rest} s` : "";
      if (state === "cut" && rest === 0) this.#reconnect();
    };
    if (delay) this.#ticking = setInterval(tick, 250);
    tick();
  }

  #isOpen() { return ["connecting", "live"].includes(this.section.dataset.state); }

  #toggle() {
    if (!this.#isOpen()) return this.#reconnect();
    const fanfare = this.#fanfare;
    this.#fanfare = null;
    fanfare?.close();
    this.#notice("Cut. Write something in the other pane.");
    this.#show("cut", CUT * 1000);
  }

  #reconnect() { this.connect(this.#position); }

  #event(event, recovered) {
    const row = element("div", "event", "");
    const add = (kind, text) => row.append(element("span", kind, text), " ");
    if (event.sender === this.user) row.classList.add("own");
    add("sender", event.sender ?? "backend");
    if (event.to !== undefined) add("chip private", event.to === this.user ? "only you" : `only ${event.to}`);
    if (recovered) add("chip recovered", "recovered");
    row.append(hiddenFromScreenReaders("id", event.id ?? "no id"), " ");
    add("body", event.text ?? JSON.stringify(event.data ?? event));
    if (event.id !== undefined) row.dataset.id = event.id;
    this.#append(row);
    if (recovered && this.#resumed) this.#recount(1);
  }

  #recount(more = 0) {
    this.#resumed.count += more;
    const { row, count, lastEventId } = this.#resumed;
    const what = count === 0 ? "nothing was missed" : `${count} ${count === 1 ? "event" : "events"} recovered`;
    row.replaceChildren("Resumed", hiddenFromScreenReaders("", ` after ${lastEventId}`), `: ${what}`);
  }

  #notice(content, kind = "plain") {
    const row = element("div", `notice ${kind}`, "");
    row.append(...[content].flat());
    this.#append(row);
    return row;
  }

  #append(row) {
    const list = this.part(".events");
    const following = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    list.append(row);
    while (list.children.length > ROWS) list.firstElementChild.remove();
    if (following) list.scrollTop = list.scrollHeight;
  }

  async #submit(event) {
    event.preventDefault();
    const { text, to } = event.target.elements;
    const message = { text: text.value, ...(to.value && { to: to.value }) };
    text.value = "";
    text.focus();
    try {
      const id = await this.#fanfare.send(message);
      // A private message is not delivered to its sender, so this pane adds it.
      if (message.to && message.to !== this.user) this.#event({ sender: this.user, ...message, id }, false);
    } catch (error) {
      this.#notice(`“${message.text}”: ${error.message}`, "bad");
    }
  }
}

const channel = document.querySelector("#channel");
fill("channel", channel);
const panes = [new Pane("left"), new Pane("right")];
updateUrl();

channel.addEventListener("change", () => {
  if (!channel.reportValidity()) return;
  updateUrl();
  showCurl();
  for (const pane of panes) pane.restart();
});

// A command that publishes to the channel. A channel from a link may be no channel at all, but shell code.
const curl = document.querySelector("#curl");
const copy = document.querySelector("#copy");
const copied = document.querySelector("#copied");

function showCurl() {
  copy.disabled = !channel.checkValidity();
  const url = `http://127.0.0.1:9080/publish?channel=${channel.value}`;
  curl.textContent = copy.disabled ? "" : `curl '${url}' -d '{"text":"hello"}'`;
  copied.textContent = "";
}
showCurl();

copy.addEventListener("click", () => {
  getSelection().selectAllChildren(curl);
  // Deprecated, but navigator.clipboard is missing on plain HTTP.
  copied.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
});

// Polls /readyz while the page is visible.
const ready = document.querySelector("#ready");

async function checkReady() {
  if (document.hidden) return;
  let answer = "unreachable";
  try {
    const response = await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(READY_INTERVAL) });
    const text = (await response.text()).trim();
    if (text === "ready" || text === "not ready") answer = text; // not from a proxy
  } catch {} // it does not answer
  if (answer !== ready.textContent) ready.textContent = answer; // screen readers announce each assignment
  ready.parentElement.dataset.ready = answer;
}
checkReady();
setInterval(checkReady, READY_INTERVAL);
document.addEventListener("visibilitychange", checkReady);
