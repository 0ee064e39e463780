"use strict";
// Shows frames of /api/v1/stream. Every text of a job or a site reaches the page as a text node, never as markup.

const TONES = {
  ACTIVE: "good", LOADED: "good", SUCCEEDED: "good", RUNNING: "busy", PLACED: "busy", LOADING: "busy", EVICTING: "busy", ACCEPTED: "busy",
  GRANTED: "busy", QUEUED: "wait", CORDONED: "warn", DRAINING: "warn", SUSPECT: "warn", RELEASED: "warn", DECLINED: "warn",
  LOST: "bad", FAILED: "bad", QUARANTINED: "bad", EXPIRED: "bad", CANCELLED: "idle", LOADABLE: "idle",
};
const open = new Map(); // job id -> its verdicts, or null while they are fetched
let view = null;
let heardAt = 0;

function el(tag, options, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const by = (id) => document.getElementById(id);
const state = (word, text) => el("span", { class: "state " + (TONES[word] || "idle") }, text || word.toLowerCase());
const empty = (text) => el("p", { class: "none" }, text);

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (count >= 1024 && step < units.length - 1) { count /= 1024; step += 1; }
  return (count >= 100 || step === 0 ? count.toFixed(0) : count.toFixed(1)) + " " + units[step];
}

function span(ms) {
  if (ms < 0) ms = 0;
  if (ms < 1000) return Math.round(ms) + " ms";
  if (ms < 60_000) return (ms / 1000).toFixed(1) + " s";
  if (ms < 3_600_000) return Math.floor(ms / 60_000) + " min " + Math.floor(ms / 1000) % 60 + " s";
  if (ms < 86_400_000) return Math.floor(ms / 3_600_000) + " h " + Math.floor(ms / 60_000) % 60 + " min";
  return Math.floor(ms / 86_400_000) + " d";
}

const clock = (ms) => new Date(ms).toLocaleTimeString([], { hour12: false });
const ago = (ms) => span(Math.max(0, view.mesh.now_ms - ms)) + " ago";

function bar(label, used, total, text, warns) {
  const limits = warns ? { low: 0.8, high: 0.95, optimum: 0 } : {};
  const meter = el("meter", { min: 0, max: 1, value: total > 0 ? used / total : 0, "aria-label": label + ": " + text, ...limits });
  return el("div", { class: "bar", title: label }, el("span", {}, label), meter, el("span", {}, text));
}

function siteCard(site) {
  const busy = site.slots - site.free_slots;
  const card = el("article", { class: "card" },
    el("header", {}, el("h3", {}, site.site), state(site.status), site.country ? el("small", {}, site.country) : null,
      el("span", { class: "seen" }, site.seen_at_ms ? "seen " + ago(site.seen_at_ms) : "never seen")),
    bar("slots", busy, site.slots, busy + " of " + site.slots),
    bar("memory", site.memory_bytes - site.free_memory_bytes, site.memory_bytes,
      bytes(site.free_memory_bytes) + " free of " + bytes(site.memory_bytes), true));
  if (site.models_bytes) {
    card.append(bar("models", site.models_bytes - site.free_models_bytes, site.models_bytes,
      bytes(site.free_models_bytes) + " free of " + bytes(site.models_bytes), true));
  }
  for (const device of site.devices) {
    card.append(bar(device.name || device.kind, device.memory_bytes - device.free_bytes, device.memory_bytes,
      bytes(device.free_bytes) + " free of " + bytes(device.memory_bytes), true));
  }
  card.append(el("div", { class: "models" }, ...site.models.map((model) => {
    const tag = state(model.state, model.repo_id + " · " + model.state.toLowerCase());
    tag.title = [model.dtype, model.quantization, model.attn_implementation, model.revision.slice(0, 12), bytes(model.weights_bytes),
      model.pinned && "pinned", model.detail].filter(Boolean).join(" · ");
    return tag;
  })));
  const v = site.versions;
  card.append(el("p", {}, [v.python && "Python " + v.python, v.nnsight && "nnsight " + v.nnsight, v.torch && "torch " + v.torch,
    site.sandbox ? "sandbox " + site.sandbox : "no sandbox: runs nothing"].filter(Boolean).join(" · ")));
  if (site.note) card.append(el("p", {}, site.note));
  return card;
}

const shortId = (job) => "…" + job.slice(-8);
const terminal = (job) => ["SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED", "QUARANTINED"].includes(job.status);

function jobRows(job) {
  const end = terminal(job) ? job.updated_at_ms : view.mesh.now_ms;
  const place = job.status === "QUEUED" && job.position ? " · " + job.position : "";
  const row = el("tr", {},
    el("td", { class: "name" },
      el("button", { class: "row", "aria-expanded": String(open.has(job.job)), onclick: () => toggle(job.job), title: job.job },
        job.name || shortId(job.job)),
      job.name ? el("div", { class: "id" }, shortId(job.job)) : null),
    el("td", {}, state(job.status, job.status.toLowerCase() + place)),
    el("td", {}, job.model.repo_id),
    el("td", {}, job.site || "–"),
    el("td", { class: "number" }, String(job.attempts.length)),
    el("td", { class: "number", title: new Date(job.submitted_at_ms).toISOString() }, clock(job.submitted_at_ms)),
    el("td", { class: "number" }, span(end - job.submitted_at_ms)),
    el("td", { class: "text" }, job.text));
  return open.has(job.job) ? [row, details(job)] : [row];
}

function details(job) {
  const cell = el("td", { colspan: 8 }, el("div", { class: "id" }, job.job, " · owner ", job.owner));
  if (job.failure) cell.append(el("h4", {}, "Why it ended: ", el("code", {}, job.failure.code)), el("pre", {}, job.failure.text));
  cell.append(el("h4", {}, "Attempts"));
  if (!job.attempts.length) cell.append(empty("None yet."));
  else {
    cell.append(el("table", {}, el("thead", {}, el("tr", {}, ...["", "Site", "Status", "Granted", "Ran", "Processor", "Memory", "Detail"].map((t) => el("th", {}, t)))),
      el("tbody", {}, ...job.attempts.map((a) => el("tr", {}, el("td", {}, String(a.attempt)), el("td", {}, a.site), el("td", {}, state(a.status)),
        el("td", {}, clock(a.granted_at_ms)),
        el("td", {}, a.started_at_ms ? span((a.ended_at_ms || view.mesh.now_ms) - a.started_at_ms) : "–"),
        el("td", {}, a.receipt ? span(a.receipt.cpu_ms) : "–"),
        el("td", {}, a.receipt ? bytes(a.receipt.peak_memory_bytes) : "–"),
        el("td", {}, a.failure ? a.failure.code + ": " + a.failure.text : a.detail))))));
  }
  const why = open.get(job.job);
  cell.append(el("h4", {}, "Sites considered"));
  if (why === null) cell.append(empty("Asking …"));
  else if (typeof why === "string") cell.append(empty(why));
  else if (!why.length) cell.append(empty("No verdicts: the job needs no placement now."));
  else {
    cell.append(el("table", {}, el("tbody", {}, ...why.map((verdict) => el("tr", {}, el("td", {}, verdict.site),
      el("td", {}, verdict.reasons.length ? state("FAILED", "no") : state("ACTIVE", "fits")),
      el("td", {}, verdict.reasons.length ? verdict.reasons.map((r) => r.code + ": " + r.text).join(" ")
        : verdict.score_s === null ? "" : "expected in " + span(verdict.score_s * 1000)))))));
  }
  return el("tr", { class: "details" }, cell);
}

async function toggle(job) {
  if (open.delete(job)) { draw(); return; }
  open.set(job, null);
  draw();
  try {
    const answer = await fetch("/api/v1/jobs/" + encodeURIComponent(job) + "/why");
    const body = await answer.json();
    if (open.has(job)) open.set(job, answer.ok ? body : String(body.detail));
  } catch {
    if (open.has(job)) open.set(job, "The coordinator does not answer now.");
  }
  draw();
}

function eventRow(event) {
  return el("tr", {}, el("td", { class: "when" }, clock(event.at_ms)), el("td", { class: "what" }, event.what + (event.attempt ? " #" + event.attempt : "")),
    el("td", {}, event.site || ""), el("td", { class: "id", title: event.job || "" }, event.job ? shortId(event.job) : ""),
    el("td", { class: "text" }, event.text));
}

function total(name, value) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, String(value)));
}

function draw() {
  if (!view) return;
  const focused = document.activeElement instanceof HTMLElement ? document.activeElement.title : "";
  const { mesh, queue, jobs, events, reasons } = view;
  by("federation").textContent = mesh.federation;
  document.title = mesh.running + " running, " + mesh.queued + " queued · " + mesh.federation;
  const up = mesh.sites.filter((site) => !["LOST", "SUSPECT"].includes(site.status)).length;
  by("totals").replaceChildren(total("sites up", up + " / " + mesh.sites.length), total("running", mesh.running),
    total("queued", mesh.queued), total("epoch", mesh.epoch));
  by("problem").hidden = !reasons.length;
  by("problem").textContent = reasons.join(" ");
  by("sites").replaceChildren(...(mesh.sites.length ? mesh.sites.map(siteCard) : [empty("No site has said anything yet.")]));
  const waiting = Object.entries(queue);
  const most = Math.max(1, ...waiting.map(([, count]) => count));
  by("queue").replaceChildren(...(waiting.length
    ? waiting.map(([model, count]) => bar(model, count, most, String(count)))
    : [empty("Nothing waits.")]));
  by("jobs-note").textContent = jobs.length ? "the newest " + jobs.length : "";
  by("jobs").replaceChildren(...(jobs.length ? jobs.flatMap(jobRows) : [el("tr", {}, el("td", { colspan: 8 }, "No jobs yet."))]));
  by("events").replaceChildren(...(events.length ? events.map(eventRow) : [el("tr", {}, el("td", {}, "Nothing recorded yet."))]));
  if (focused) document.querySelector(`button.row[title="${CSS.escape(focused)}"]`)?.focus();
}

function link(tone, text) {
  by("link").className = "state " + tone;
  by("link").textContent = text;
}

const stream = new EventSource("/api/v1/stream");
stream.addEventListener("view", (message) => {
  view = JSON.parse(message.data);
  heardAt = Date.now();
  link(view.reasons.length ? "warn" : "good", view.reasons.length ? "not ready" : "live");
  if (!window.getSelection().toString()) draw(); // a redraw would take the reader's selection away
});
stream.addEventListener("error", () => link("bad", "no contact"));
setInterval(() => {
  if (heardAt && Date.now() - heardAt > 10_000) link("bad", "no news for " + span(Date.now() - heardAt));
}, 1000);
