"use strict";
// The page is whole without this: it adds sorting, finding, values under the pointer, and the choice of colours.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);

  function themeButton() {
    const root = document.documentElement;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const button = one("#theme");
    const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
    const label = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
    button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });
    dark.addEventListener("change", label);
    label();
    button.hidden = false;
  }

  function valueOf(row, column) {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  }

  function sortBy(table, heads, head) {
    const column = head.cellIndex;
    const numeric = head.classList.contains("n");
    const before = head.getAttribute("aria-sort");
    // Numbers begin with the largest, which is what one looks for; texts with the first.
    const ascending = before === null ? !numeric : before === "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
    const rows = all("tr", table.tBodies[0]).map((row) => [valueOf(row, column), row]);
    rows.sort(([a], [b]) => (ascending ? compare(a, b) : compare(b, a)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  function sortable(table) {
    const heads = all("thead th", table);
    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sortBy(table, heads, head));
      head.append(button);
    }
  }

  function finder() {
    const field = one("#find");
    const targets = all("[data-find]").map((element) => [element.dataset.find.toLowerCase(), element]);
    function find() {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const [text, element] of targets) element.hidden = !words.every((word) => text.includes(word));
      for (const sheet of all(".sheet")) sheet.hidden = all(".group", sheet).every((group) => group.hidden);
      const shown = targets.filter(([, element]) => !element.hidden).length;
      one("#found").value = words.length ? `${shown} of ${targets.length} rows and picture groups; charts and totals stay` : "";
    }
    field.addEventListener("input", find);
    one("#finder").addEventListener("submit", (event) => event.preventDefault());
    one("#finder").hidden = false;
    find(); // a browser that goes back restores what was typed
  }

  function families() {
    for (const box of all("[data-shows]")) {
      const show = () => { document.getElementById(box.dataset.shows).toggleAttribute("hidden", !box.checked); };
      box.hidden = false;
      box.addEventListener("change", show);
      show();
    }
  }

  function tips() {
    const tip = one("#tip");
    const marks = JSON.parse(one("#marks")?.textContent ?? "[]");
    const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
    const counts = new Intl.NumberFormat("en");
    function textOfMark(mark) {
      const named = mark.datasets.reduce((sum, [, images]) => sum + images, 0);
      const datasets = mark.datasets.map(([name, images]) => `${name} ${counts.format(images)}`);
      if (named < mark.images) datasets.push(`others ${counts.format(mark.images - named)}`);
      return `${mark.family}, ${digits.format(mark.in_plane)} mm in-plane, ${digits.format(mark.between)} mm between `
        + `slices: ${counts.format(mark.images)} image${mark.images === 1 ? "" : "s"} (${datasets.join(", ")})`;
    }
    function textOf(target) {
      if (!(target instanceof Element)) return null;
      const circle = target.closest("[data-mark]");
      return circle ? textOfMark(marks[circle.dataset.mark]) : target.closest("[data-tip]")?.dataset.tip ?? null;
    }
    document.addEventListener("pointermove", (event) => {
      const text = textOf(event.target);
      tip.hidden = text === null;
      if (text === null) return;
      tip.textContent = text;
      const { width, height } = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
      tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
    });
    document.addEventListener("pointerleave", () => { tip.hidden = true; });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
  }

  themeButton();
  all("table.sortable").forEach(sortable);
  finder();
  families();
  tips();
})();
