// The demo page: two panes, each with one user's connection to the same channel, and to more of them.
// The URL sets the fields: channel=NAME, left=HOST:PORT, leftUser=NAME, leftChannels=NAME,NAME, and right ones.
import { Pane } from "./pane.js";

const READY_INTERVAL = 5_000; // ms between requests for /readyz

// The URL holds the fields that differ from these defaults, for reloads and links. Tokens stay out of it.
const DEFAULTS = {
  channel: "ws_broadcast",
  left: location.host,
  leftUser: "alice",
  leftChannels: "",
  right: location.host,
  rightUser: "bob",
  rightChannels: "",
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

const channel = document.querySelector("#channel");
fill("channel", channel);
const panes = ["left", "right"].map((name) => new Pane(name, { fill, updateUrl, channel: channel.value }));
updateUrl();

channel.addEventListener("change", () => {
  if (!channel.reportValidity()) return;
  showCurl();
  for (const pane of panes) pane.restart(channel.value);
  updateUrl();
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
