(function () {
  "use strict";
  var root = document.documentElement;

  function recall() {
    try { return localStorage.getItem("distinit-theme"); } catch (error) { return null; }
  }

  function remember(theme) {
    try { localStorage.setItem("distinit-theme", theme); } catch (error) { /* it holds for this page */ }
  }

  var known = recall();
  if (known === "dark" || known === "light") { root.dataset.theme = known; }

  function isDark() {
    if (root.dataset.theme) { return root.dataset.theme === "dark"; }
    return window.matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function startTheme() {
    var button = document.querySelector(".theme");
    var system = window.matchMedia("(prefers-color-scheme: dark)");
    function name() { button.textContent = isDark() ? "Light colours" : "Dark colours"; }
    button.hidden = false;
    name();
    button.addEventListener("click", function () {
      root.dataset.theme = isDark() ? "light" : "dark";
      remember(root.dataset.theme);
      name();
    });
    system.addEventListener("change", name);
  }

  // What sorts a cell: its number, else its text; null for a cell that says nothing.
  function keyOf(cell, numeric) {
    if (!cell) { return null; }
    if (numeric) { return cell.dataset.value === undefined ? null : Number(cell.dataset.value); }
    var text = cell.textContent.trim();
    return text === "" || text === "\u2013" ? null : text;
  }

  function compare(one, other, numeric) {
    return numeric ? one - other : one.localeCompare(other, undefined, { numeric: true, sensitivity: "base" });
  }

  function sort(table, column, numeric, descending) {
    var body = table.tBodies[0];
    var rows = Array.from(body.rows).map(function (row) {
      return { row: row, key: keyOf(row.cells[column], numeric) };
    });
    rows.sort(function (one, other) {
      if (one.key === null || other.key === null) { return (one.key === null) - (other.key === null); }
      return (descending ? -1 : 1) * compare(one.key, other.key, numeric);
    });
    rows.forEach(function (entry) { body.appendChild(entry.row); });
  }

  function startTable(table, told) {
    var heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      var numeric = head.classList.contains("n");
      var button = document.createElement("button");
      button.type = "button";
      var name = head.textContent;
      var label = document.createElement("span");
      while (head.firstChild) { label.appendChild(head.firstChild); }
      button.appendChild(label);
      head.appendChild(button);
      button.addEventListener("click", function () {
        var before = head.getAttribute("aria-sort");
        var descending = before ? before === "ascending" : numeric;
        heads.forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sort(table, column, numeric, descending);
        told.textContent = "Sorted by " + name + (descending ? ", descending" : ", ascending");
      });
    });
  }

  // A box that needs no scrolling is no stop for the keyboard.
  function startBoxes() {
    var boxes = Array.from(document.querySelectorAll(".scroll, pre"));
    function look() {
      boxes.forEach(function (box) {
        if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) { box.tabIndex = 0; } else { box.removeAttribute("tabindex"); }
      });
    }
    look();
    window.addEventListener("resize", look);
    document.addEventListener("toggle", look, true);
    window.addEventListener("load", look);
  }

  document.addEventListener("DOMContentLoaded", function () {
    var told = document.getElementById("told");
    startTheme();
    document.querySelectorAll("table").forEach(function (table) { startTable(table, told); });
    startBoxes();
  });
})();
