// The demo page: two panes, each with one user's connection to the same channel.
// Another node for the second pane: /?right=HOST:PORT. Another channel: /?channel=NAME.
import { Fanfare } from "./fanfare.js";

const CUT = 10; // seconds that a cut connection stays closed, to write something meanwhile
const ROWS = 500; // rows kept in a pane

const query = new URLSearchParams(location.search);
const channel = document.querySelector("#channel");
channel.value = query.get("channel") || "ws_broadcast";

const WORDS = { connecting: "connecting", live: "live", waiting: "lost", closed: "closed", cut: "cut" };

class Pane {
  #fanfare = null;
  #position = null; // the last id, kept over connections
  #resumed = null; // the notice with the number of recovered events
  #until = 0; // when the countdown ends
  #ticking;

  constructor(name, user, node) {
    const section = document.querySelector("#pane").content.cloneNode(true).firstElementChild;
    this.part = (selector) => section.querySelector(selector);
    this.section = section;
    section.id = name;
    section.setAttribute("aria-label", `${name} pane`);
    this.part(".user").value = user;
    this.part(".node").value = node;
    for (const field of [".user", ".node"]) {
      this.part(field).addEventListener("change", (event) => event.target.reportValidity() && this.connect());
    }
    this.part("form").addEventListener("submit", (event) => this.#submit(event));
    this.part(".cut").addEventListener("click", () => this.#toggle());
    document.querySelector("#panes").append(section);
    this.connect();
  }

  get user() { return this.part(".user").value; }

  /** Opens a new connection, which resumes after this id if there is one. */
  connect(lastEventId = null) {
    this.#fanfare?.close();
    this.#position = lastEventId;
    this.#resumed = null;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const url = `${scheme}://${this.part(".node").value}/ws/${encodeURIComponent(this.user)}`;
    this.part(".events").setAttribute("aria-label", `Messages to ${this.user}`);
    let fanfare;
    try {
      fanfare = this.#fanfare = new Fanfare(url, { channel: channel.value, lastEventId });
    } catch {
      this.#fanfare = null;
      this.#show("closed");
      return this.#notice(`Cannot connect to ${url}`, "bad");
    }
    const hear = (name, handler) => fanfare.on(name, (...values) => {
      if (fanfare !== this.#fanfare) return; // from an earlier connection
      this.#position = fanfare.lastEventId;
      this.part(".position").textContent = this.#position ?? "none yet";
      handler(...values);
    });
    hear("state", (change) => this.#changed(change));
    hear("message", (event, { recovered }) => this.#event(event, recovered));
    hear("recovered", ({ lastEventId }) => {
      this.#resumed = { count: 0, row: this.#notice("", "good"), lastEventId };
      this.#recount();
    });
    const gaps = { welcome: "Not recovered", reset: "Reset", unreadable: "Skipped an event" };
    hear("gap", ({ from }) => this.#notice(
      `${gaps[from]}: events may be missing above. A real page would reload its state now.`, "bad"));
    hear("error", (error) => this.#notice(error.message, "bad"));
  }

  #changed({ state, delay, code, reason }) {
    const before = this.section.dataset.state;
    this.#show(state, delay);
    if (state === "waiting" && before === "live") {
      this.#notice(`Connection lost (${reason ? `${code}, ${reason}` : code})`);
    }
    if (state === "live" && !this.part(".events").children.length) this.#notice(`Connected as ${this.user}`);
  }

  /** Shows a state, with a countdown if its end is known. */
  #show(state, delay) {
    this.section.dataset.state = state;
    this.part(".state").textContent = WORDS[state];
    this.part(".send").disabled = state !== "live";
    this.part(".cut").textContent = state === "cut" ? "Reconnect now" : "Cut the connection";
    this.#until = delay ? Date.now() + delay : 0;
    clearInterval(this.#ticking);
    const tick = () => {
      const rest = Math.max(0, Math.ceil((this.#until - Date.now()) / 1000));
      const what = state === "cut" ? "back" : "retry";
      this.part(".countdown").textContent = this.#until ? `, ${what} in ${rest} s` : "";
      if (state === "cut" && rest === 0) this.#back();
    };
    if (delay) this.#ticking = setInterval(tick, 250);
    tick();
  }

  #toggle() {
    if (this.section.dataset.state === "cut") return this.#back();
    const fanfare = this.#fanfare;
    this.#fanfare = null;
    fanfare?.close();
    this.#notice("Cut. Write something in the other pane.");
    this.#show("cut", CUT * 1000);
  }

  #back() { this.connect(this.#position); }

  #event(event, recovered) {
    const row = document.createElement("div");
    const add = (kind, text) => {
      const part = document.createElement("span");
      part.className = kind;
      part.textContent = text;
      row.append(part, " ");
    };
    row.className = "event";
    if (event.sender === this.user) row.classList.add("own");
    add("sender", event.sender ?? "backend");
    if (event.to !== undefined) add("chip private", event.to === this.user ? "only you" : `only ${event.to}`);
    if (recovered) add("chip recovered", "recovered");
    add("id", event.id ?? "no id");
    add("body", event.text ?? JSON.stringify(event.data ?? event));
    if (event.id !== undefined) row.dataset.id = event.id;
    this.#append(row);
    if (recovered && this.#resumed) this.#recount(1);
  }

  #recount(more = 0) {
    this.#resumed.count += more;
    const { row, count, lastEventId } = this.#resumed;
    const what = count === 0 ? "nothing was missed" : `${count} ${count === 1 ? "event" : "events"} recovered`;
    row.textContent = `Resumed after ${lastEventId}: ${what}`;
  }

  #notice(text, kind = "plain") {
    const row = document.createElement("div");
    row.className = `notice ${kind}`;
    row.textContent = text;
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

const panes = [
  new Pane("left", "alice", location.host),
  new Pane("right", "bob", query.get("right") || location.host),
];

channel.addEventListener("change", () => {
  if (!channel.reportValidity()) return;
  for (const pane of panes) {
    pane.part(".events").replaceChildren();
    pane.connect();
  }
});
