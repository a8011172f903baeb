"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);

  async function unpack(id) {
    const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return await new Response(stream).text();
  }

  // --- theme: the system's, until the button is pressed ---------------------------------------
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const setTheme = (name) => { root.dataset.theme = name; };
  setTheme(dark.matches ? "dark" : "light");

  // --- findings: they work before the charts are there ----------------------------------------
  const shown = new Set([...document.querySelectorAll(".chip")].map((c) => c.dataset.severity));
  const cards = [...document.querySelectorAll("#cards > li")];
  let visible = null; // layers that the filter leaves, or null for all
  function showCards() {
    for (const card of cards) {
      const layers = card.dataset.layers.split(" ").filter(Boolean).map(Number);
      const kept = visible === null || !layers.length || layers.some((i) => visible.has(i));
      card.hidden = !(shown.has(card.dataset.severity) && kept);
    }
  }
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const on = chip.classList.toggle("on");
      chip.setAttribute("aria-pressed", on);
      shown[on ? "add" : "delete"](chip.dataset.severity);
      showCards();
    });
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch { // pages opened as files may not: select it instead
        getSelection().selectAllChildren(code);
      }
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1200);
    });
  }

  // --- data and chart library -----------------------------------------------------------------
  if (!("DecompressionStream" in window)) {
    $("loading").textContent = "This browser is too old to unpack the charts.";
    return;
  }
  const [text, library] = await Promise.all([unpack("data"), unpack("charts")]);
  const data = JSON.parse(text), layers = data.layers;
  const element = document.createElement("script");
  element.textContent = library;
  document.head.append(element);
  const plotly = window.Plotly;
  $("loading").remove();
  $("explorer").hidden = false;

  // what to show of each channel; scale: log, or signed about zero, or plain; range: of the colours
  const MEASURES = {
    kl: { name: "KL divergence", scale: "log", range: [-4, 1],
      meaning: "How far this data is from the running statistics: above 0.1 evaluation sees other data than training did." },
    z: { name: "z-score of the mean", scale: "signed", range: [-3, 3],
      meaning: "(mean − running mean) / running standard deviation." },
    offset: { name: "|mean| / standard deviation", scale: "log", range: [-2, 4],
      meaning: "Large offsets cost low precision its digits, and some kernels theirs." },
    eps_share: { name: "share of eps", scale: "log", range: [-7, 0],
      meaning: "eps / (variance + eps): near 1 the channel is constant or dead." },
    mean: { name: "mean", scale: "signed", meaning: "Mean of the input." },
    std: { name: "standard deviation", scale: "log", meaning: "Standard deviation of the input." },
    weight: { name: "weight", scale: "signed", meaning: "The layer's own; near 0 the channel can be pruned." },
    nonfinite: { name: "NaN and Inf", scale: "plain", meaning: "How many values of the input are not finite." },
  };
  const severities = ["error", "warning", "note"];
  const worst = layers.map((_, i) => Math.min(...data.findings
    .filter((f) => f.layers.includes(i)).map((f) => severities.indexOf(f.severity)), 3));

  const has = (key) => layers.some((l) => l.channels[key]);
  for (const [key, m] of Object.entries(MEASURES)) {
    if (has(key)) $("measure").add(new Option(m.name, key));
  }
  let chosen = Math.max(0, worst.indexOf(Math.min(...worst)));

  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const narrow = () => innerWidth < 700;
  const number = (v) => v === null || v === undefined ? "none"
    : Number.isInteger(v) && Math.abs(v) < 1e6 ? v.toLocaleString("en")
    : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? String(Number(v.toPrecision(3)))
    : v.toExponential(1).replace("e", " × 10^").replace("+", "");

  function layout(extra) {
    const axis = {
      gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"),
      automargin: true,
    };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { color: color("--quiet"), size: 12, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: color("--card"), font: { color: color("--ink") }, bordercolor: color("--line") },
      margin: { l: 50, r: 10, t: 26, b: 40 },
    };
    for (const key of Object.keys(extra)) {
      if (/^[xy]axis/.test(key)) extra[key] = { ...axis, ...extra[key] };
    }
    return { ...base, ...extra };
  }
  const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false };

  // --- heat map ---------------------------------------------------------------------------------
  function scaled(v, scale) {
    if (v === null || v === undefined) return null;
    return scale === "log" ? Math.log10(Math.max(v, 1e-12)) : v;
  }
  // what all names end in says nothing
  const paths = layers.map((l) => l.name.split("."));
  let common = 0;
  while (paths.length > 1 && paths.every((p) => p.length > common + 1 && p.at(-1 - common) === paths[0].at(-1 - common))) common++;
  function short(name) {
    const parts = (common ? name.split(".").slice(0, -common).join(".") : name).split(".");
    const most = narrow() ? 18 : 34;
    // initials for the outermost modules: numbers stay, so that layers are told apart
    for (let i = 0; i < parts.length - 1 && parts.join(".").length > most; i++) {
      if (!/^\d+$/.test(parts[i])) parts[i] = parts[i].slice(0, 1);
    }
    const last = parts.pop(), outer = parts.map((part) => part + ".").join("");
    const room = Math.max(most - outer.length, 8), head = room >> 1;
    const cut = last.length > room ? last.slice(0, head - 1) + "…" + last.slice(head - room) : last;
    return outer + cut || "(the model)";
  }
  // names break after a dot, not within a word
  const breakable = (name) => (name || "(the model)").split(/(?<=\.)/)
    .flatMap((part, i) => i ? [document.createElement("wbr"), part] : [part]);
  function drawHeat() {
    const key = $("measure").value, m = MEASURES[key];
    if (!m) { $("heat").hidden = true; return; }
    $("meaning").textContent = m.meaning;
    $("measured").textContent = m.name + ". ";
    const rows = layers.map((_, i) => i)
      .filter((i) => layers[i].channels[key] && (visible === null || visible.has(i)));
    const columns = Math.max(1, ...rows.map((i) => layers[i].channels[key].length));
    const fill = (values, f) => Array.from({ length: columns }, (_, c) => f(values[c], c));
    const z = rows.map((i) => fill(layers[i].channels[key], (v) => scaled(v, m.scale)));
    const known = z.flat().filter((v) => v !== null);
    let range = m.range;
    if (!range && m.scale === "signed") {
      const sizes = known.map(Math.abs).sort((a, b) => a - b);
      const most = sizes[Math.floor(0.99 * (sizes.length - 1))] || 1;
      range = [-most, most];
    }
    if (!range) {
      range = [known.reduce((a, b) => Math.min(a, b), Infinity), known.reduce((a, b) => Math.max(a, b), -Infinity)];
      if (!(range[0] < range[1])) range = [range[0] - 1, range[0] + 1];
    }
    const night = root.dataset.theme === "dark";
    const middle = night ? "#2b313d" : "#f1f2f4";
    const scale = m.scale === "signed"
      ? [[0, "#2f6fb3"], [0.5, middle], [1, "#c9562f"]]
      : [[0, middle], [0.45, night ? "#4d6bb8" : "#8fa8e0"], [0.75, "#d99a3c"], [1, "#c0281c"]];
    const ticks = m.scale !== "log" ? {} : (() => {
      const values = [];
      for (let t = Math.ceil(range[0]); t <= range[1]; t += range[1] - range[0] > 5 ? 2 : 1) values.push(t);
      return { tickvals: values, ticktext: values.map((t) => t >= -2 && t <= 3 ? String(Number((10 ** t).toPrecision(1))) : `10<sup>${t}</sup>`) };
    })();
    const trace = {
      type: "heatmap", z, y: rows.map((i) => i), x0: 0, dx: 1, zmin: range[0], zmax: range[1],
      colorscale: scale, hoverongaps: false, ygap: rows.length < 60 ? 1 : 0,
      text: rows.map((i) => fill(layers[i].channels[key], (v) => v === null ? "not finite" : number(v))),
      customdata: rows.map((i) => fill([], () => layers[i].name || "(the model)")),
      hovertemplate: `%{customdata}<br>channel %{x}<br>${m.name}: %{text}<extra></extra>`,
      colorbar: { thickness: 10, len: Math.min(1, 260 / (16 * rows.length + 80)), y: 1, yanchor: "top", outlinewidth: 0, ...ticks },
    };
    const step = Math.ceil(rows.length / 90);
    const labelled = rows.filter((_, k) => k % step === 0);
    const height = Math.max(190, (rows.length > 60 ? 13 : 18) * rows.length + 90);
    plotly.react("heat", [trace], layout({
      height,
      margin: { l: 10, r: 10, t: 10, b: 40 },
      xaxis: { title: { text: "channel" }, showgrid: false, zeroline: false },
      yaxis: {
        type: "category", autorange: "reversed", tickvals: labelled, ticktext: labelled.map((i) => short(layers[i].name)),
        tickfont: { family: "ui-monospace, monospace", size: 10 }, showgrid: false, zeroline: false,
      },
    }), CONFIG);
    if (!$("heat").dataset.ready) {
      $("heat").dataset.ready = "yes";
      $("heat").on("plotly_click", (e) => select(Number(e.points[0].y)));
    }
  }

  // --- one layer ----------------------------------------------------------------------------------
  function drawLayer() {
    const l = layers[chosen];
    $("name").replaceChildren(...breakable(l.name));
    $("what").textContent = `${l.kind} of input (${l.shape.join(", ")}), ${l.dtype}${l.channelsLast ? ", channels_last" : ""}; normalizes by ${l.usesRunning ? "its running statistics" : "each input's own statistics"}`;
    const numbers = [
      ["channels", l.numChannels], ["values per statistic", l.values || null], ["eps", l.eps],
      ["largest |mean| / std", l.offset], ["median share of eps", l.epsShare],
      ["NaN and Inf", l.nan + l.inf], ["weights near zero", l.channels.weight ? l.zeroWeights : null],
      ["torch's error, in std", l.torchError], ["truenorm's error, in std", l.ourError],
    ].filter(([, value]) => value !== null);
    $("numbers").replaceChildren(...numbers.map(([name, value]) => {
      const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = number(value).replace(/\^(−?-?\d+)/, (_, e) => [...e].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] || "⁻").join(""));
      box.append(dt, dd);
      return box;
    }));
    const bars = (h, axis, fill, name) => {
      if (!h) return null;
      const [low, high, counts] = h, width = (high - low) / counts.length;
      return {
        type: "bar", x: counts.map((_, i) => low + (i + 0.5) * width), y: counts, width,
        xaxis: "x" + axis, yaxis: "y" + axis, marker: { color: fill, line: { width: 0 } },
        hovertemplate: `${name}<br>about %{x:.3g}: %{y} values<extra></extra>`,
      };
    };
    const stacked = narrow();
    const grid = { rows: stacked ? 2 : 1, columns: stacked ? 1 : 2, pattern: "independent" };
    const y = { showticklabels: false, showgrid: false };
    plotly.react("distributions", [
      bars(l.before, "", color("--quiet"), "before"), bars(l.after, "2", color("--accent"), "after"),
    ].filter(Boolean), layout({
      grid: { ...grid, ygap: 0.45 }, height: stacked ? 400 : 230, margin: { l: 12, r: 12, t: 8, b: 40 }, bargap: 0,
      xaxis: { title: { text: "value before" } }, yaxis: y,
      xaxis2: { title: { text: "value after" } }, yaxis2: y,
    }), CONFIG);
    const c = l.channels;
    $("gap").hidden = !c.running_mean;
    if (c.running_mean) {
      const points = (running, seen, axis, name) => {
        const both = [...running, ...seen].filter((v) => v !== null);
        const ends = [both.reduce((a, b) => Math.min(a, b)), both.reduce((a, b) => Math.max(a, b))];
        return [
          { type: "scatter", mode: "lines", x: ends, y: ends, xaxis: "x" + axis, yaxis: "y" + axis,
            line: { color: color("--quiet"), dash: "dot", width: 1 }, hoverinfo: "skip" },
          { type: "scatter", mode: "markers", x: running, y: seen, xaxis: "x" + axis, yaxis: "y" + axis,
            text: running.map((_, i) => i), marker: { color: color("--accent"), size: 6, opacity: 0.65 },
            hovertemplate: `channel %{text}<br>running ${name} %{x:.3g}<br>this data's %{y:.3g}<extra></extra>` },
        ];
      };
      plotly.react("scatter", [
        ...points(c.running_mean, c.mean, "", "mean"), ...points(c.running_std, c.std, "2", "standard deviation"),
      ], layout({
        grid: { ...grid, xgap: 0.18, ygap: 0.25 }, height: stacked ? 620 : 340,
        xaxis: { title: { text: "running mean" } }, yaxis: { title: { text: "mean of this data" } },
        xaxis2: { title: { text: "running standard deviation" } }, yaxis2: { title: { text: "that of this data" } },
      }), CONFIG);
    }
  }

  // --- the layers down the side --------------------------------------------------------------------
  const items = layers.map((l, i) => {
    const item = document.createElement("li"), button = document.createElement("button"), kind = document.createElement("small");
    button.type = "button";
    button.append(...breakable(l.name), " ");
    kind.textContent = l.kind;
    button.append(kind);
    if (worst[i] < 3) {
      const dot = document.createElement("span");
      dot.className = "dot " + severities[worst[i]];
      dot.title = severities[worst[i]];
      dot.textContent = "●";
      button.prepend(dot);
    }
    button.addEventListener("click", () => select(i));
    item.append(button);
    return item;
  });
  $("layers").append(...items);

  function select(i, scroll) {
    items[chosen].firstChild.removeAttribute("aria-current");
    chosen = i;
    items[chosen].firstChild.setAttribute("aria-current", "true");
    const list = $("layers"), item = items[chosen];
    if (item.offsetTop < list.scrollTop || item.offsetTop > list.scrollTop + list.clientHeight) {
      list.scrollTop = item.offsetTop - list.clientHeight / 2;
    }
    drawLayer();
    if (scroll) $("layer").scrollIntoView();
  }
  let waiting;
  $("filter").addEventListener("input", () => {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    visible = words.length ? new Set() : null;
    layers.forEach((l, i) => {
      const kept = words.every((w) => `${l.name} ${l.kind}`.toLowerCase().includes(w));
      items[i].hidden = !kept;
      if (kept && visible) visible.add(i);
    });
    showCards();
    clearTimeout(waiting);
    waiting = setTimeout(drawHeat, 80);
  });
  $("measure").addEventListener("change", drawHeat);
  for (const link of document.querySelectorAll("a.where")) {
    link.replaceChildren(...breakable(link.textContent.trim()));
    link.addEventListener("click", (e) => {
      e.preventDefault();
      if (MEASURES[link.dataset.measure] && has(link.dataset.measure)) {
        $("measure").value = link.dataset.measure;
        drawHeat();
      }
      select(Number(link.dataset.layer), true);
    });
  }
  const drawAll = () => { drawHeat(); drawLayer(); };
  $("theme").addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
    drawAll();
  });
  dark.addEventListener("change", () => { setTheme(dark.matches ? "dark" : "light"); drawAll(); });
  let before, folded;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const one of folded) one.open = true; // nobody opens them on paper
    setTheme("light");
    drawAll();
  });
  addEventListener("afterprint", () => {
    for (const one of folded) one.open = false;
    setTheme(before);
    drawAll();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    // other than by a few pixels: labels and grids change with it
    if ((width < 700) !== narrow()) drawAll();
    width = innerWidth;
  });

  drawHeat();
  select(chosen);
  root.dataset.ready = performance.now().toFixed(0);
})();
