// One user's connection: its fields, its channels and their events.
import { Fanfare } from "./fanfare.js";

const CUT = 10; // seconds that a cut connection stays closed, to write something meanwhile
const ROWS = 500; // rows kept in a pane
const TOKEN_REJECTED = new Set([4001, 4401]); // close codes: expired; missing or invalid

const WORDS = { connecting: "connecting", live: "live", waiting: "not connected", closed: "not connected", cut: "cut" };

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

const fromTemplate = (id) => document.querySelector(id).content.cloneNode(true).firstElementChild;

/** A word of a shell command: names come from links, and people copy the command. */
const shellWord = (text) => (/^[\w.@:+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** A channel that a pane follows, and its item in the list. */
class Channel {
  source = null; // the client for the default channel, else a subscription
  position = null; // the last id, kept over connections
  resumed = null; // the notice with the number of recovered events
  unread = 0; // events since it was last selected

  constructor(name) {
    this.name = name;
    this.item = fromTemplate("#channel-item");
    this.radio = this.item.querySelector("input");
    this.radio.value = name;
    this.item.querySelector(".name").textContent = name;
    this.item.querySelector(".leave").setAttribute("aria-label", `Unsubscribe from ${name}`);
    this.show();
  }

  /** Shows its position, or its state while it has none, and what is unread. */
  show() {
    const state = this.source?.state ?? "closed";
    const word = state === "connecting" || state === "waiting" ? state : "none yet";
    this.item.dataset.state = state;
    this.item.querySelector(".at").textContent = this.position ?? word;
    this.item.querySelector(".unread").textContent = this.unread ? `${this.unread} unread` : "";
  }
}

export class Pane {
  #fanfare = null;
  #host; // of the connection; a link may say `127.0.0.1:8080@other.example`
  #channels = new Map(); // name → channel, the default one first
  #default;
  #selected;
  #dividedFor = null; // the user and node of the last divider
  #outcomeShown = false; // whether this connection has been live, or a notice says why not
  #until = 0; // when the countdown ends
  #ticking;
  #updateUrl;

  constructor(name, { fill, updateUrl, channel }) {
    const section = fromTemplate("#pane");
    this.part = (selector) => section.querySelector(selector);
    this.section = section;
    this.#updateUrl = updateUrl;
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
    this.part(".message").addEventListener("submit", (event) => this.#submit(event));
    this.part(".subscribe").addEventListener("submit", (event) => this.#submitChannel(event));
    this.part(".cut").addEventListener("click", () => this.#toggle());
    document.querySelector("#panes").append(section);
    this.#addDefault(channel);
    const pane = this;
    fill(`${name}Channels`, {
      get value() { return [...pane.#channels.keys()].filter((name) => name !== pane.#default.name).join(","); },
      set value(names) { for (const name of names.split(",")) if (name) pane.#add(name); },
    });
    this.connect();
  }

  /** Starts anew, with another default channel. */
  restart(channel) {
    this.part(".events").replaceChildren();
    this.#dividedFor = null;
    for (const name of [this.#default.name, channel]) this.#remove(name);
    this.#addDefault(channel);
    this.connect();
  }

  get user() { return this.part(".user").value; }
  get node() { return this.part(".node").value; }

  /** Opens a new connection, which resumes where the channels are, or starts anew. */
  connect({ resume = false } = {}) {
    this.#fanfare?.close();
    this.#outcomeShown = false;
    for (const channel of this.#channels.values()) {
      if (!resume) channel.position = null;
      channel.resumed = channel.source = null;
    }
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const url = `${scheme}://${this.node}/ws/${encodeURIComponent(this.user)}`;
    const token = this.part(".token").value.trim();
    this.part(".token").removeAttribute("aria-invalid");
    const { name, position } = this.#default;
    let fanfare;
    try {
      fanfare = this.#fanfare = new Fanfare(url, { channel: name, lastEventId: position, token, gapDelay: 0 });
      this.#host = new URL(url).host;
    } catch {
      this.#fanfare = null;
      this.#show("closed");
      return this.#notice(`Cannot connect to ${url}`, "bad");
    }
    this.#listen(this.#default, fanfare, {
      state: (change) => this.#changed(change),
      error: ({ code, message }) => {
        if (TOKEN_REJECTED.has(code)) this.#askForToken(message);
        else if (fanfare.state === "closed") this.#notice(`Not connected (${code}): ${message}`, "bad");
        else if (code !== "unreachable") this.#notice(message, "bad"); // shown after the first attempt
      },
    });
    for (const channel of this.#channels.values()) this.#subscribe(channel);
    this.#select(this.#selected);
  }

  /** Handles the events of a channel, some of them with these handlers. */
  #listen(channel, source, handlers) {
    channel.source = source;
    const gaps = { welcome: "Not recovered", reset: "Reset", unreadable: "Skipped an event" };
    const all = {
      state: () => {},
      message: (event, { recovered }) => this.#event(event, recovered, channel),
      recovered: ({ lastEventId }) => {
        channel.resumed = { count: 0, row: this.#notice("", "good", channel), lastEventId };
        this.#recount(channel);
      },
      gap: ({ from }) => this.#notice(
        `${gaps[from]}: events may be missing above. A real page would reload its state now.`, "bad", channel),
      ...handlers,
    };
    for (const [name, handler] of Object.entries(all)) {
      source.on(name, (...values) => {
        if (source !== channel.source) return; // from an earlier connection
        channel.position = source.lastEventId;
        handler(...values);
        channel.show();
        if (channel === this.#selected) this.#showPosition();
      });
    }
  }

  #addDefault(name) {
    this.#default = new Channel(name);
    this.#default.item.querySelector(".leave").remove(); // the connection itself follows it
    this.#channels = new Map([[name, this.#default], ...this.#channels]);
    this.#list(this.#default);
    this.part(".channels ul").prepend(this.#default.item);
    this.#select(this.#default);
  }

  #list(channel) {
    channel.radio.name = `${this.section.id}-channel`;
    channel.radio.addEventListener("change", () => this.#select(channel));
    this.part(".channels ul").append(channel.item);
  }

  /** The channel of this name, subscribed if it is not there yet. */
  #add(name) {
    const present = this.#channels.get(name);
    if (present) return present;
    const channel = new Channel(name);
    this.#channels.set(name, channel);
    channel.item.querySelector(".leave").addEventListener("click", () => {
      this.#remove(name);
      this.#updateUrl();
      this.#selected.radio.focus();
    });
    this.#list(channel);
    this.#subscribe(channel);
    return channel;
  }

  #subscribe(channel) {
    if (channel === this.#default || !this.#fanfare || this.#fanfare.state === "closed") return;
    const subscription = this.#fanfare.subscribe(channel.name, { lastEventId: channel.position });
    this.#listen(channel, subscription, {
      error: ({ code, message }) => {
        if (subscription.state !== "closed") return this.#notice(`${channel.name}: ${message}`, "bad");
        this.#remove(channel.name);
        this.#updateUrl();
        this.#notice(`Not subscribed to ${channel.name} (${code}): ${message}`, "bad");
      },
    });
    channel.show();
  }

  #remove(name) {
    const channel = this.#channels.get(name);
    if (!channel) return;
    const { source } = channel;
    channel.source = null;
    if (channel !== this.#default) source?.close();
    this.#channels.delete(name);
    channel.item.remove();
    for (const row of this.#rows(channel)) row.remove();
    if (channel === this.#selected && channel !== this.#default) this.#select(this.#default);
  }

  #rows({ name }) { return [...this.part(".events").children].filter((row) => row.dataset.channel === name); }

  /** Shows the events of a channel, which messages then go to. */
  #select(channel) {
    this.#selected = channel;
    channel.radio.checked = true;
    channel.unread = 0;
    channel.show();
    const list = this.part(".events");
    for (const row of list.children) row.hidden = this.#isHidden(row);
    list.scrollTop = list.scrollHeight;
    list.setAttribute("aria-label", `Messages to ${this.user} in ${channel.name}`);
    this.#showPosition();
  }

  #isHidden({ dataset }) { return dataset.channel !== undefined && dataset.channel !== this.#selected.name; }

  #showPosition() { this.part(".position").textContent = this.#selected.position ?? "none yet"; }

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
    for (const channel of this.#channels.values()) channel.source = null;
    fanfare?.close();
    this.#notice("Cut. Write something in the other pane.");
    this.#show("cut", CUT * 1000);
  }

  #reconnect() { this.connect({ resume: true }); }

  #event(event, recovered, channel) {
    const row = element("div", "event", "");
    const add = (kind, text) => row.append(element("span", kind, text), " ");
    if (event.sender === this.user) row.classList.add("own");
    if (channel !== this.#default) add("chip in", channel.name);
    add("sender", event.sender ?? "backend");
    if (event.to !== undefined) add("chip private", event.to === this.user ? "only you" : `only ${event.to}`);
    if (recovered) add("chip recovered", "recovered");
    row.append(hiddenFromScreenReaders("id", event.id ?? "no id"), " ");
    add("body", event.text ?? JSON.stringify(event.data ?? event));
    if (event.id !== undefined) row.dataset.id = event.id;
    if (channel !== this.#selected) channel.unread++;
    this.#append(row, channel);
    if (recovered && channel.resumed) this.#recount(channel, 1);
  }

  #recount(channel, more = 0) {
    channel.resumed.count += more;
    const { row, count, lastEventId } = channel.resumed;
    const what = count === 0 ? "nothing was missed" : `${count} ${count === 1 ? "event" : "events"} recovered`;
    row.replaceChildren("Resumed", hiddenFromScreenReaders("", ` after ${lastEventId}`), `: ${what}`);
  }

  #notice(content, kind = "plain", channel = undefined) {
    const row = element("div", `notice ${kind}`, "");
    row.append(...[content].flat());
    this.#append(row, channel);
    return row;
  }

  /** Adds a row of a channel, or one that all of them show. */
  #append(row, channel) {
    const list = this.part(".events");
    const following = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    if (channel) row.dataset.channel = channel.name;
    row.hidden = this.#isHidden(row);
    list.append(row);
    while (list.children.length > ROWS) list.firstElementChild.remove();
    if (following) list.scrollTop = list.scrollHeight;
  }

  async #submit(event) {
    event.preventDefault();
    const { text, to } = event.target.elements;
    const channel = this.#selected;
    const message = { text: text.value, ...(to.value && { to: to.value }) };
    text.value = "";
    text.focus();
    try {
      const id = await channel.source.send(message);
      // A private message is not delivered to its sender, so this pane adds it.
      if (message.to && message.to !== this.user) this.#event({ sender: this.user, ...message, id }, false, channel);
    } catch (error) {
      this.#notice(`“${message.text}”: ${error.message}`, "bad");
    }
  }

  #submitChannel(event) {
    event.preventDefault();
    const { channel } = event.target.elements;
    this.#select(this.#add(channel.value));
    channel.value = "";
    this.#updateUrl();
  }
}
