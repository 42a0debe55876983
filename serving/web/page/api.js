// The calls of the server's HTTP interface. Bytes are base64 in its JSON.

let token = "";

/** An answer with an error: its HTTP status and the server's text. */
export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export function setToken(value) {
  token = value;
}

/** Return the JSON of an answer. Throws Refused, and TypeError if no server answers. */
export async function call(path, body) {
  const headers = { Accept: "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body),
  });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, content.detail || content.title || `HTTP ${answer.status}`);
  return content;
}

/**
 * Return a function that runs an asynchronous task, one run at a time. Calls during a run ask for one more run after it,
 * so a task never lags behind by more than one run.
 */
export function latest(task) {
  let running = false;
  let wanted = false;
  return async function run() {
    wanted = true;
    if (running) return;
    running = true;
    try {
      while (wanted) {
        wanted = false;
        await task();
      }
    } finally {
      running = false;
    }
  };
}

/** Return a function that runs another one once no further call came for this time. */
export function settled(run, milliseconds) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(run, milliseconds);
  };
}

export function toBase64(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

export function fromBase64(text) {
  return Uint8Array.from(atob(text || ""), (character) => character.charCodeAt(0));
}
