// Elements, and how a part of the page takes a new content without losing what the reader did.
// Text is only ever set as text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. Attributes that are null, undefined or false are left out. */
export function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...solid(children));
  return element;
}

function solid(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** Give `parent` the children `fresh`; nodes that stay the same sort of thing are kept, and with
 * them focus, selection, scroll positions and open disclosures. `data-key` names a thing that may
 * move among its siblings. */
export function show(parent, ...fresh) {
  const nodes = solid(fresh).map((child) =>
    child instanceof Node ? child : document.createTextNode(child));
  const keyed = new Map();
  for (const child of parent.childNodes) {
    if (keyOf(child) !== null) keyed.set(keyOf(child), child);
  }
  let next = parent.firstChild;
  for (const node of nodes) {
    const key = keyOf(node);
    const old = key === null ? next : keyed.get(key);
    if (!old || !alike(old, node)) {
      parent.insertBefore(node, next);
      continue;
    }
    if (old === next) next = next.nextSibling;
    else parent.insertBefore(old, next);
    update(old, node);
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  }
}

function keyOf(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null;
}

function alike(old, node) {
  return old.nodeName === node.nodeName && old.namespaceURI === node.namespaceURI &&
    keyOf(old) === keyOf(node);
}

function update(old, node) {
  if (node.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== node.nodeValue) old.nodeValue = node.nodeValue;
    return;
  }
  // Whether a disclosure is open is the reader's business once it is there.
  const theirs = (name) => name === "open" && old.nodeName === "DETAILS";
  for (const { name } of [...old.attributes]) {
    if (!node.hasAttribute(name) && !theirs(name)) old.removeAttribute(name);
  }
  for (const { name, value } of node.attributes) {
    if (old.getAttribute(name) !== value && !theirs(name)) old.setAttribute(name, value);
  }
  show(old, ...node.childNodes);
}
