"use strict";
// Keeps what is live on a page new, and lets a lasso on the map list its images. Pages work without.

const live = document.getElementById("live");
const isBusy = () => live.querySelector("input:checked") || live.contains(document.activeElement);

const renew = async () => {
  if (document.hidden || isBusy()) return;
  const answer = await fetch(location.href).catch(() => null);
  if (!answer || !answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const next = page.getElementById("live");
  const wasLive = live.dataset.refresh;
  live.replaceChildren(...next.childNodes);
  // what can be done with a run changes when it ends
  if (wasLive && !next.dataset.refresh) location.reload();
};

if (live.dataset.refresh) {
  setInterval(renew, 1000 * live.dataset.refresh);
  if (live.dataset.stream) {
    let waits = false;
    const soon = () => {
      if (waits) return;
      waits = true;
      setTimeout(() => { waits = false; renew(); }, 500);
    };
    const source = new EventSource(live.dataset.stream);
    source.onmessage = soon;
    source.addEventListener("end", () => { source.close(); soon(); });
  }
}

const MOST = 200;
const map = document.querySelector("form.map");
if (map) {
  const svg = map.querySelector("svg");
  const line = svg.querySelector(".lasso");
  const list = map.querySelector(".images");
  const points = [...svg.querySelectorAll("circle")];
  let corners = null;

  const place = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [at.x, at.y];
  };
  const isInside = (x, y) => corners.reduce((inside, [x1, y1], i) => {
    const [x2, y2] = corners[(i + 1) % corners.length];
    return (y1 > y) !== (y2 > y) && x < ((x2 - x1) * (y - y1)) / (y2 - y1) + x1 ? !inside : inside;
  }, false);

  const picture = (point) => {
    const { id, cluster } = point.dataset;
    const item = document.createElement("li");
    const link = document.createElement("a");
    const image = document.createElement("img");
    link.href = `/runs/${map.dataset.run}/images/${id}`;
    image.src = `/api/runs/${map.dataset.run}/images/${id}/picture?side=128`;
    image.alt = `image ${id}, cluster ${cluster}`;
    image.loading = "lazy";
    link.append(image);
    const text = document.createElement("span");
    text.textContent = `${id}, cluster ${cluster}`;
    item.append(link, text);
    return item;
  };
  const show = (chosen) => {
    for (const point of points) point.classList.toggle("chosen", chosen.includes(point));
    const shown = chosen.slice(0, MOST);
    const rest = chosen.length > shown.length ? `, the first ${MOST} of which are shown` : "";
    map.querySelector("p.chosen").textContent = `${chosen.length} images${rest}`;
    list.replaceChildren(...shown.map(picture));
  };

  svg.addEventListener("pointerdown", (event) => {
    corners = [place(event)];
    svg.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    if (!corners) return;
    corners.push(place(event));
    line.setAttribute("points", corners.map((one) => one.join(",")).join(" "));
  });
  svg.addEventListener("pointerup", () => {
    if (!corners) return;
    show(points.filter((one) => isInside(one.cx.baseVal.value, one.cy.baseVal.value)));
    corners = null;
    line.setAttribute("points", "");
  });
  map.addEventListener("submit", (event) => event.preventDefault());
  map.elements.cluster.addEventListener("change", (event) => {
    show(points.filter((one) => one.dataset.cluster === event.target.value));
  });
}
