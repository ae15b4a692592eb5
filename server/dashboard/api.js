// The admin API: one stream of events, and what is asked for once. The key travels in a header,
// never in an address.

const EVENTS = "/admin/v1/events";
const LONGEST_PAUSE = 30_000;
const LONGEST_SILENCE = 40_000; // the server breaks its silence every 15 s

/** The server refused the key. */
export class Refused extends Error {}

async function ask(path, key, signal) {
  const answer = await fetch(path, {
    headers: { Authorization: `Bearer ${key}` }, cache: "no-store", credentials: "omit", signal,
  });
  if (answer.ok) return answer;
  const form = await answer.json().catch(() => null);
  const message = form?.error?.message ?? `the server answered ${answer.status}`;
  throw answer.status === 403 ? new Refused(message) : new Error(message);
}

/** The JSON that a path answers with. */
export async function get(path, key) {
  return (await ask(path, key)).json();
}

/** Listen until `signal` aborts; after a break again, at growing intervals.
 *
 * `on.open()`, `on.event(name, body)`, `on.lost(reason, seconds)`: tried again after those seconds.
 * Throws Refused if the key is wrong or no longer right.
 */
export async function listen(key, on, signal) {
  let pause = 1000;
  while (!signal.aborted) {
    let reason = "the connection ended";
    try {
      await once(key, {
        ...on,
        open: () => { pause = 1000; on.open(); },
      }, signal);
    } catch (error) {
      if (error instanceof Refused || signal.aborted) throw error;
      reason = error instanceof TypeError ? "the server does not answer" : error.message;
    }
    if (signal.aborted) return;
    const wait = pause * (0.75 + Math.random() / 2);
    on.lost(reason, Math.round(wait / 1000));
    await rest(wait, signal);
    pause = Math.min(pause * 2, LONGEST_PAUSE);
  }
}

async function once(key, on, signal) {
  const silent = new AbortController();
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => silent.abort(new Error("the server fell silent")), LONGEST_SILENCE);
  };
  try {
    heard();
    const answer = await ask(EVENTS, key, AbortSignal.any([signal, silent.signal]));
    on.open();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      heard();
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) dispatch(block, on.event);
    }
  } finally {
    clearTimeout(timer);
    silent.abort();
  }
}

function dispatch(block, event) {
  const fields = new Map();
  for (const line of block.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon > 0) fields.set(line.slice(0, colon), line.slice(colon + 2));
  }
  if (fields.has("data")) event(fields.get("event"), JSON.parse(fields.get("data")));
}

/** Wait; a reader who comes back to the page, or a network that does, ends it early. */
function rest(milliseconds, signal) {
  return new Promise((done) => {
    const over = new AbortController();
    const end = () => { clearTimeout(timer); over.abort(); done(); };
    const timer = setTimeout(end, milliseconds);
    const options = { signal: over.signal };
    signal.addEventListener("abort", end, options);
    window.addEventListener("online", end, options);
    document.addEventListener("visibilitychange", () => { if (!document.hidden) end(); }, options);
  });
}
