"use strict";
(() => {
  const { columns, rows } = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const table = find("table");
  const bodies = table ? [...table.tBodies] : [];
  const collator = new Intl.Collator("en", { numeric: true });
  const isNumber = (value) => typeof value === "number";
  const text = (value) =>
    value === null
      ? "–"
      : isNumber(value) && !Number.isInteger(value)
        ? String(Math.abs(value) >= 1000 ? Math.round(value) : Number(value.toPrecision(4)))
        : String(value);
  const cell = (row, column) => rows[row].cells[column];
  const counted = (count) => `${count} ${count === 1 ? "run" : "runs"}`;
  const distinct = (values) => [...new Set(values)];
  const title = (column) =>
    columns[column].name + (columns[column].unit ? ` [${columns[column].unit}]` : "");
  let shown = rows.map((_, row) => row);

  // Numbers before words, and what is missing last.
  function order(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    if (isNumber(a) !== isNumber(b)) return isNumber(a) ? -1 : 1;
    return isNumber(a) ? a - b : collator.compare(a, b);
  }

  // ---- Sorting
  for (const head of table ? table.tHead.rows[0].cells : []) {
    head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const column = Number(head.dataset.column);
      const sorted = rows
        .map((_, row) => row)
        .sort((i, j) => {
          const a = cell(i, column),
            b = cell(j, column);
          return (down && a !== null && b !== null ? -1 : 1) * order(a, b) || i - j;
        });
      table.append(...sorted.map((row) => bodies[row]));
    });
  }

  // ---- Filtering: every word must hold, and one of the pressed statuses.
  const haystacks = bodies.map((body, row) =>
    `${body.rows[0].textContent} ${rows[row].cells.slice(0, 2).join(" ")}`.toLowerCase(),
  );
  const names = columns.map((column) => column.name.toLowerCase());
  const buttons = [...document.querySelectorAll("[data-status]")];

  function holds(word, row) {
    const [, name, sign, wanted] = /^(.+?)([=<>])(.*)$/.exec(word) || [];
    const column = names.indexOf(name);
    if (column < 0) return haystacks[row].includes(word);
    const value = cell(row, column),
      number = Number(wanted);
    if (sign === "=")
      return text(value).toLowerCase() === wanted || (wanted !== "" && value === number);
    return isNumber(value) && wanted !== "" && (sign === "<" ? value < number : value > number);
  }

  function applyFilter() {
    const words = (
      find("filter")
        .value.toLowerCase()
        .match(/(?:"[^"]*"|[^\s"])+/g) || []
    ).map((word) => word.replaceAll('"', ""));
    const pressed = buttons
      .filter((button) => button.getAttribute("aria-pressed") === "true")
      .map((button) => button.dataset.status);
    shown = rows
      .map((_, row) => row)
      .filter(
        (row) =>
          (!pressed.length || pressed.includes(cell(row, names.indexOf("status")))) &&
          words.every((word) => holds(word, row)),
      );
    const visible = new Set(shown);
    bodies.forEach((body, row) => {
      body.hidden = !visible.has(row);
    });
    find("shown").textContent = `${shown.length} of ${rows.length} shown`;
    drawFrontier();
    drawScalars();
  }

  // ---- Pictures
  const SVG = "http://www.w3.org/2000/svg";
  function draw(kind, attributes, parent, words) {
    const element = document.createElementNS(SVG, kind);
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    if (words !== undefined) element.textContent = words;
    if (parent) parent.append(element);
    return element;
  }

  // A mark that names its run when pointed at, and leads to its row when clicked.
  function mark(parent, row, words) {
    const link = draw("a", { href: `#run-${row}`, tabindex: -1 }, parent);
    draw("title", {}, link, words);
    return link;
  }

  function options(select, choices, chosen) {
    select.replaceChildren(
      ...choices.map((column) => new Option(column === -1 ? "none" : title(column), column)),
    );
    select.value = chosen;
  }

  const describe = (row) =>
    columns
      .map((column, index) =>
        column.group === "parameter" ? `${column.name} = ${text(cell(row, index))}` : "",
      )
      .filter(Boolean)
      .join(", ");

  const parameters = columns
    .map((_, index) => index)
    .filter((index) => columns[index].group === "parameter");
  const varied = (column) => distinct(rows.map((_, row) => cell(row, column))).length > 1;
  const levels = (column) =>
    distinct(rows.map((_, row) => cell(row, column)).filter((value) => value !== null)).sort(order);
  const steps = (column) =>
    distinct(rows.map((_, row) => cell(row, column)).filter(isNumber)).sort((a, b) => a - b);

  // Where the figures of some runs come from, and in how many of them.
  function provenance(some) {
    const counts = {};
    for (const row of some) {
      const labels = Object.entries(rows[row].labels).filter(
        ([column]) => columns[column].group === "scalar",
      );
      for (const label of distinct(labels.map(([, label]) => label)))
        counts[label] = (counts[label] || 0) + 1;
    }
    return (
      Object.entries(counts)
        .map(([label, count]) => `${label} (${counted(count)})`)
        .join(" · ") || "none recorded any"
    );
  }

  function drawFrontier() {
    const section = find("frontier");
    if (!section) return;
    const x = Number(find("frontier-x").value),
      y = Number(find("frontier-y").value);
    const facets = section.querySelector(".facets");
    facets.replaceChildren();
    if (x === y) {
      facets.append("Choose two different parameters.");
      return;
    }
    const others = columns
      .map((_, index) => index)
      .filter(
        (index) =>
          index !== x &&
          index !== y &&
          (columns[index].group === "parameter" || columns[index].name === "notebook") &&
          varied(index),
      );
    const usable = shown.filter((row) => isNumber(cell(row, x)) && cell(row, y) !== null);
    const groups = new Map();
    for (const row of usable) {
      const key = others
        .map((column) => `${columns[column].name} = ${text(cell(row, column))}`)
        .join(", ");
      groups.set(key, [...(groups.get(key) || []), row]);
    }
    const xs = steps(x),
      ys = levels(y);
    const drawn = [...groups].slice(0, 24);
    for (const [name, some] of drawn) facets.append(frontier(name, some, x, y, xs, ys));
    if (groups.size > drawn.length)
      facets.append(`${groups.size - drawn.length} more combinations: use the filter.`);
    section.querySelector(".provenance").textContent = usable.length
      ? `What these runs recorded is: ${provenance(usable)}.`
      : shown.length === rows.length
        ? "No run has both."
        : "No run to show: the filter leaves none.";
  }

  function frontier(name, some, x, y, xs, ys) {
    const wide = Math.max(14, Math.min(52, 600 / xs.length)),
      high = Math.max(14, Math.min(28, 420 / ys.length));
    const left = 32 + 8.2 * Math.max(...ys.map((value) => text(value).length)),
      bottom = 4 + high * ys.length;
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = name;
    const width = left + 16 + Math.max(wide * xs.length, 8 * title(x).length);
    const svg = draw("svg", {
      width,
      height: bottom + 46,
      viewBox: `0 0 ${width} ${bottom + 46}`,
      role: "img",
    });
    figure.append(...(name ? [caption] : []), svg);
    const fate = new Map(); // the worst of the runs at a point
    for (const row of some) {
      const at = `${xs.indexOf(cell(row, x))} ${ys.indexOf(cell(row, y))}`;
      const status = cell(row, names.indexOf("status"));
      const kind = status === "done" ? "fits" : status === "oom" ? "short" : "other";
      if (!fate.has(at) || kind === "short" || fate.get(at).kind === "fits")
        fate.set(at, { kind, row, status });
    }
    const summary = [];
    ys.forEach((value, j) => {
      const top = bottom - high * (j + 1);
      if (j % Math.ceil(18 / high) === 0)
        draw(
          "text",
          { x: left - 7, y: top + high / 2 + 5, "text-anchor": "end" },
          svg,
          text(value),
        );
      const fitting = xs.filter((_, i) => (fate.get(`${i} ${j}`) || {}).kind === "fits");
      summary.push(
        `${columns[y].name} ${text(value)}: ` +
          (fitting.length ? `fits up to ${text(Math.max(...fitting))}` : "none fits"),
      );
      xs.forEach((_, i) => {
        const box = {
          x: left + wide * i + 1,
          y: top + 1,
          width: wide - 2,
          height: high - 2,
          rx: 3,
        };
        const point = fate.get(`${i} ${j}`);
        if (!point) {
          draw("rect", { ...box, class: "untried" }, svg);
          return;
        }
        const link = mark(
          svg,
          point.row,
          `${describe(point.row)}: ${point.status}` +
            (rows[point.row].oom ? `. ${rows[point.row].oom}` : ""),
        );
        draw("rect", { ...box, class: point.kind }, link);
        const { needs_gib: needs, at_least: bound } = rows[point.row];
        const words =
          point.kind === "other"
            ? "?"
            : needs === null
              ? { fits: "", short: "×" }[point.kind]
              : (bound ? "≥" : "") + Number(needs < 1 ? needs.toFixed(2) : needs.toPrecision(3));
        if (wide >= 48 || words.length < 2)
          draw(
            "text",
            { x: box.x + box.width / 2, y: box.y + box.height / 2 + 5, "text-anchor": "middle" },
            link,
            words,
          );
      });
    });
    // The line between what fits and what does not.
    const at = (i, j) => (fate.get(`${i} ${j}`) || {}).kind;
    xs.forEach((_, i) =>
      ys.forEach((_, j) => {
        const right = left + wide * (i + 1),
          top = bottom - high * (j + 1),
          pair = (a, b) => a && b && a !== b && [a, b].every((kind) => kind !== "other");
        if (pair(at(i, j), at(i + 1, j)))
          draw("line", { class: "edge", x1: right, x2: right, y1: top, y2: top + high }, svg);
        if (isNumber(ys[j]) && pair(at(i, j), at(i, j + 1)))
          draw("line", { class: "edge", x1: right - wide, x2: right, y1: top, y2: top }, svg);
      }),
    );
    let free = 0;
    xs.forEach((value, i) => {
      const centre = left + wide * (i + 0.5),
        half = 4.4 * text(value).length;
      if (centre - half < free) return;
      draw("text", { x: centre, y: bottom + 18, "text-anchor": "middle" }, svg, text(value));
      free = centre + half + 6;
    });
    draw("text", { x: left, y: bottom + 39, class: "soft" }, svg, `${title(x)} →`);
    draw(
      "text",
      { x: 13, y: bottom, class: "soft", transform: `rotate(-90 13 ${bottom})` },
      svg,
      `${title(y)} →`,
    );
    svg.setAttribute(
      "aria-label",
      `${name ? `${name}. ` : ""}${columns[x].name} that fits. ${summary.join("; ")}.`,
    );
    return figure;
  }

  // Okabe and Ito; more values than that go from dark to light.
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080"];
  const paint = (index, count) =>
    count <= COLOURS.length
      ? COLOURS[index]
      : `hsl(${250 - (200 * index) / (count - 1)} 75% ${35 + (25 * index) / (count - 1)}%)`;

  function ticks(low, high, log) {
    const found = [];
    if (log) {
      const decades = Math.log10(high / low);
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const factor of decades > 4 ? [1] : decades > 2 ? [1, 3] : [1, 2, 5])
          found.push(factor * 10 ** power);
    } else {
      const rough = (high - low) / 6,
        power = 10 ** Math.floor(Math.log10(rough));
      const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
      for (let index = Math.ceil(low / step); index * step <= high; index++)
        found.push(Number((index * step).toPrecision(12)));
    }
    return found.filter((value) => value >= low && value <= high);
  }

  function scale(values, log, from, to, zero) {
    let low = Math.min(...values),
      high = Math.max(...values);
    if (log) {
      const room = Math.max((high / low) ** 0.04, 1.02);
      low /= room;
      high *= room;
    } else {
      const room = (high - low || Math.abs(high) || 1) * 0.05;
      high += room;
      low = zero && low >= 0 && low < 0.7 * high ? 0 : low - room;
    }
    const f = log ? Math.log10 : (value) => value;
    const place = (value) => from + ((to - from) * (f(value) - f(low))) / (f(high) - f(low));
    return { place, ticks: ticks(low, high, log) };
  }

  function drawScalars() {
    const section = find("scalars");
    if (!section || !find("x").options.length || !find("y").options.length) return;
    const [x, y, colour] = ["x", "y", "colour"].map((id) => Number(find(id).value));
    const figure = section.querySelector("figure"),
      legend = section.querySelector(".legend");
    figure.replaceChildren();
    legend.replaceChildren();
    const value = (row, column) =>
      typeof cell(row, column) === "boolean" ? Number(cell(row, column)) : cell(row, column);
    const points = shown.filter((row) => isNumber(value(row, y)) && cell(row, x) !== null);
    if (!points.length) {
      figure.append("No run to show: none that passes the filter has both.");
      return;
    }
    const numeric = points.every((row) => isNumber(cell(row, x)));
    const kinds = distinct(points.map((row) => cell(row, x))).sort(order);
    const across = (row) => (numeric ? cell(row, x) : kinds.indexOf(cell(row, x)));
    const positive = [
      numeric && points.every((row) => across(row) > 0),
      points.every((row) => value(row, y) > 0),
    ];
    find("log-x").disabled = !positive[0];
    find("log-y").disabled = !positive[1];
    const hues = colour < 0 ? [null] : distinct(points.map((row) => cell(row, colour))).sort(order);
    const labels = distinct(points.map((row) => rows[row].labels[y] || "no label"));
    const width = Math.max(640, figure.clientWidth),
      left = 86,
      right = width - 20,
      top = 14,
      bottom = 380,
      height = bottom + 52 + 20 * labels.length;
    const svg = draw(
      "svg",
      { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" },
      figure,
    );
    svg.setAttribute(
      "aria-label",
      `${title(y)} against ${title(x)}: ${points.length} runs, ${labels.join("; ")}`,
    );
    const horizontal = scale(
      points.map(across),
      positive[0] && find("log-x").checked,
      left,
      right,
      false,
    );
    const vertical = scale(
      points.map((row) => value(row, y)),
      positive[1] && find("log-y").checked,
      bottom,
      top,
      true,
    );
    for (const tick of vertical.ticks) {
      const at = vertical.place(tick);
      draw("line", { x1: left, x2: right, y1: at, y2: at, class: "grid" }, svg);
      draw("text", { x: left - 8, y: at + 5, "text-anchor": "end" }, svg, text(tick));
    }
    draw("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }, svg);
    let free = 0;
    const marks = !numeric
      ? kinds.map((_, index) => index)
      : kinds.length <= 12
        ? kinds
        : horizontal.ticks;
    for (const tick of marks) {
      const words = text(numeric ? tick : kinds[tick]).slice(0, 24),
        at = horizontal.place(tick),
        half = 4.4 * words.length;
      draw("line", { x1: at, x2: at, y1: bottom, y2: bottom + 5, class: "axis" }, svg);
      if (at - half < free) continue;
      draw("text", { x: at, y: bottom + 21, "text-anchor": "middle" }, svg, words);
      free = at + half + 8;
    }
    draw("text", { x: right, y: bottom + 44, "text-anchor": "end" }, svg, title(x));
    draw(
      "text",
      { x: 20, y: top, "text-anchor": "end", transform: `rotate(-90 20 ${top})` },
      svg,
      title(y),
    );
    labels.forEach((label, index) => {
      const count = points.filter((row) => (rows[row].labels[y] || "no label") === label).length;
      draw(
        "text",
        { x: left, y: bottom + 44 + 20 * index, class: "soft" },
        svg,
        `${labels.length > 1 ? (index ? "○ " : "● ") : ""}${label} · ${counted(count)}`,
      );
    });
    // A line joins the runs that differ in nothing else, where there is one at each place.
    const others = columns
      .map((_, index) => index)
      .filter(
        (index) =>
          index !== x &&
          (columns[index].group === "parameter" || columns[index].name === "notebook"),
      );
    const lines = new Map();
    for (const row of points) {
      const key = JSON.stringify([
        rows[row].labels[y],
        ...others.map((column) => cell(row, column)),
      ]);
      if (!lines.has(key)) lines.set(key, []);
      lines.get(key).push(row);
    }
    for (const some of lines.values()) {
      some.sort((i, j) => across(i) - across(j));
      const label = rows[some[0]].labels[y] || "no label";
      const stroke = paint(colour < 0 ? 0 : hues.indexOf(cell(some[0], colour)), hues.length);
      const places = some.map((row) => [
        horizontal.place(across(row)),
        vertical.place(value(row, y)),
      ]);
      if (numeric && some.length > 1 && distinct(some.map(across)).length === some.length)
        draw(
          "polyline",
          { points: places.join(" "), fill: "none", stroke, "stroke-width": 1.5, opacity: 0.7 },
          svg,
        );
      some.forEach((row, position) => {
        const said = `${columns[y].name} = ${text(cell(row, y))} ${columns[y].unit}`;
        const words = `${said}, ${label}; ${describe(row)}`;
        const [cx, cy] = places[position];
        draw(
          "circle",
          {
            cx,
            cy,
            r: 5,
            stroke,
            "stroke-width": 2,
            fill: labels.indexOf(label) ? "var(--card)" : stroke,
            class: "point",
          },
          mark(svg, row, words),
        );
      });
    }
    if (colour < 0) return;
    hues.forEach((hue, index) => {
      const item = document.createElement("li");
      const swatch = draw("svg", { width: 14, height: 14, "aria-hidden": true });
      draw("circle", { cx: 7, cy: 7, r: 6, fill: paint(index, hues.length) }, swatch);
      item.append(swatch, `${columns[colour].name} = ${text(hue)}`);
      legend.append(item);
    });
  }

  // ---- Beginning
  function suggestLogarithm() {
    const found = steps(Number(find("x").value));
    find("log-x").checked = found.length > 2 && found[0] > 0 && found.at(-1) / found[0] >= 16;
  }

  const byInterest = [...parameters].sort(
    (a, b) => varied(b) - varied(a) || (steps(b).length > 1) - (steps(a).length > 1),
  );
  if (find("frontier")) {
    // Numbers have an edge to look for; words can stand beside it.
    const across = parameters
      .filter((column) => steps(column).length > 1)
      .sort((a, b) => steps(b).length - steps(a).length);
    const up = [
      ...across,
      ...parameters.filter((column) => levels(column).length > 1 && !across.includes(column)),
    ];
    options(find("frontier-x"), across, across[0]);
    options(find("frontier-y"), up, up[1]);
    find("frontier").querySelector(".choose").hidden = up.length === 2;
    find("frontier").addEventListener("change", drawFrontier);
  }
  if (find("scalars")) {
    const scalars = columns
      .map((_, index) => index)
      .filter(
        (index) =>
          ["scalar", "clock"].includes(columns[index].group) &&
          rows.some(
            (_, row) => isNumber(cell(row, index)) || typeof cell(row, index) === "boolean",
          ),
      );
    scalars.sort((a, b) => (columns[b].group === "scalar") - (columns[a].group === "scalar"));
    find("scalars").hidden = !scalars.length || !parameters.length;
    options(find("x"), byInterest, byInterest[0]);
    options(find("y"), scalars, scalars[0]);
    options(find("colour"), [-1, ...byInterest], byInterest.slice(1).find(varied) ?? -1);
    suggestLogarithm();
    find("x").addEventListener("change", suggestLogarithm);
    find("scalars").addEventListener("change", drawScalars);
  }
  for (const button of buttons)
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      applyFilter();
    });
  for (const button of document.querySelectorAll("[data-filter]"))
    button.addEventListener("click", () => {
      find("filter").value = button.dataset.filter;
      applyFilter();
      showTable(0);
    });
  function clear() {
    find("filter").value = "";
    for (const button of buttons) button.setAttribute("aria-pressed", false);
    applyFilter();
  }
  function showTable(top) {
    table.parentNode.scrollTop = top;
    table.parentNode.scrollIntoView();
  }
  // A link to a run opens it, in the table that shows it.
  function openTarget() {
    const body = bodies.find((body) => `#${body.id}` === location.hash);
    if (!body) return;
    if (body.hidden) clear();
    for (const details of body.querySelectorAll("th > details")) details.open = true;
    showTable(body.offsetTop - table.tHead.offsetHeight);
  }
  find("filter").addEventListener("input", applyFilter);
  find("clear").addEventListener("click", clear);
  addEventListener("hashchange", openTarget);
  addEventListener("resize", drawScalars);
  for (const hidden of document.querySelectorAll(".card[hidden], .find[hidden], .only[hidden]"))
    hidden.hidden = false;
  applyFilter();
  openTarget();
})();
