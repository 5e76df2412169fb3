"use strict";
// Filters, sorts and pages the clusters of the report, and finds the cluster of a key.
(() => {
  const root = document.getElementById("browser");
  const data = JSON.parse(document.getElementById("browser-data").textContent);
  const PER_PAGE = 24;
  const ORDERS = {
    largest: (a, b) => b.size - a.size,
    smallest: (a, b) => a.size - b.size,
    purest: (a, b) => (b.purity ?? -1) - (a.purity ?? -1),
    "least pure": (a, b) => (a.purity ?? 2) - (b.purity ?? 2),
    tightest: (a, b) => a.distance - b.distance,
    loosest: (a, b) => b.distance - a.distance,
    "drifted most": (a, b) => (b.drift ?? -1) - (a.drift ?? -1),
    "drifted least": (a, b) => (a.drift ?? 2) - (b.drift ?? 2),
    id: (a, b) => a.id - b.id,
  };
  const [order, filter, key] = ["order", "filter", "key"].map((name) => root.querySelector(`[name=${name}]`));
  const [cards, state, answer] = ["cards", "state-of", "answer"].map((name) => root.querySelector(`.${name}`));
  let page = 0;
  let only = null; // the cluster of a key

  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  const row = (images, name) => {
    const box = make("div", "", "images");
    for (const [text, source] of images) {
      const image = make("img");
      Object.assign(image, { src: source, alt: text, title: `${text} · ${name}`, loading: "lazy" });
      box.append(image);
    }
    return box;
  };

  const card = (one) => {
    const box = make("article", "", "card panel");
    const head = make("header");
    head.append(make("b", `Cluster ${one.id}`), make("span", `${one.size.toLocaleString("en")} images`, "soft small"));
    box.append(head);
    const known = [];
    if (one.seed) known.push(`seeded by ${one.seed}`);
    if (one.class !== null) known.push(`${one.class} ${(100 * one.purity).toFixed(0)} %`);
    known.push(`mean distance ${one.distance.toFixed(3)}`);
    if (one.drift !== null) known.push(`drift ${(100 * one.drift).toFixed(0)} %`);
    box.append(make("div", known.join(" · "), "soft small who"), row(one.near, "near the centroid"));
    if (one.far.length) box.append(row(one.far, "far from the centroid"));
    return box;
  };

  const wanted = () => {
    const text = filter.value.trim().toLowerCase();
    const named = (one) => [one.class, one.seed].some((name) => name && name.toLowerCase().includes(text));
    const fits = (one) => !text || String(one.id) === text || named(one);
    const all = data.clusters.filter((one) => (only === null ? fits(one) : one.id === only));
    return all.sort(ORDERS[order.value]);
  };

  const draw = () => {
    const all = wanted();
    const pages = Math.max(1, Math.ceil(all.length / PER_PAGE));
    page = Math.min(Math.max(0, page), pages - 1);
    cards.replaceChildren(...all.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
    state.textContent = `${all.length.toLocaleString("en")} clusters, page ${page + 1} of ${pages}`;
    root.querySelector("[name=before]").disabled = page === 0;
    root.querySelector("[name=after]").disabled = page === pages - 1;
  };

  const find = () => {
    const text = key.value.trim();
    if (!text || !data.keys) { answer.textContent = ""; return; }
    let at = data.keys.keys.indexOf(text);
    if (at < 0) at = data.keys.keys.findIndex((one) => one.includes(text));
    if (at < 0) { answer.textContent = `No key contains ${text}.`; return; }
    const cluster = data.keys.clusters[at];
    answer.textContent = cluster < 0 ? `${data.keys.keys[at]} was excluded.` : `${data.keys.keys[at]} is in cluster ${cluster}.`;
    if (cluster >= 0) { only = cluster; page = 0; draw(); }
  };

  const again = () => { only = null; page = 0; draw(); };
  order.addEventListener("change", again);
  filter.addEventListener("input", again);
  root.querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); if (key) find(); });
  root.querySelector("[name=before]").addEventListener("click", () => { page -= 1; draw(); });
  root.querySelector("[name=after]").addEventListener("click", () => { page += 1; draw(); });
  root.hidden = false;
  draw();
})();
