"use strict";
// The page is complete without this script, which adds the filter. Its state is the address's
// fragment, so that a link can name it: #text=read&verdict=fail&column=memfd
const form = document.querySelector("form");
const cases = [...document.querySelectorAll(".case")];
const heads = [...document.querySelectorAll(".head > span")].slice(1);
const marks = new Map(cases.map((each) => [each, [...each.querySelectorAll("summary > .mark")]]));
const texts = new Map(cases.map((each) => [each, textOf(each)]));
const names = ["text", "verdict", "column"];

function textOf(each) {
  const parts = [".id", ".source"].map((part) => each.querySelector(part).textContent);
  return [each.parentElement.firstChild.textContent, ...parts].join(" ").toLowerCase();
}

function show() {
  const text = form.text.value.trim().toLowerCase();
  const column = heads.findIndex((head) => head.textContent === form.column.value);
  const isOut = (number) => column >= 0 && number !== column;
  document.documentElement.style.setProperty("--n", column < 0 ? heads.length : 1);
  heads.forEach((head, number) => { head.hidden = isOut(number); });
  let count = 0;
  for (const each of cases) {
    marks.get(each).forEach((mark, number) => { mark.hidden = isOut(number); });
    const left = marks.get(each).filter((mark) => !mark.hidden && mark.title);
    const fits = (mark) => !form.verdict.value || mark.classList.contains(form.verdict.value);
    each.hidden = !left.some(fits) || !texts.get(each).includes(text);
    count += !each.hidden;
    for (const group of each.querySelectorAll(".group")) {
      group.hidden = column >= 0 && !group.dataset.columns.split(" ").includes(String(column));
    }
  }
  for (const part of document.querySelectorAll(".part")) {
    part.hidden = !part.querySelector(".case:not([hidden])");
  }
  form.querySelector("output").textContent = `${count} of ${cases.length} cases`;
}

function remember() {
  const state = new URLSearchParams();
  for (const name of names) if (form[name].value) state.set(name, form[name].value);
  history.replaceState(null, "", `#${state}`);
  show();
}

function recall() {
  const fragment = location.hash.slice(1);
  if (fragment && !fragment.includes("=")) {
    // A link to a case.
    const target = document.getElementById(decodeURIComponent(fragment));
    if (target) { target.hidden = false; target.open = true; target.scrollIntoView(); }
    return;
  }
  const state = new URLSearchParams(fragment);
  for (const name of names) {
    form[name].value = state.get(name) ?? "";
    if (form[name].selectedIndex < 0) form[name].selectedIndex = 0;
  }
  show();
}

form.hidden = false;
form.addEventListener("input", remember);
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("hashchange", recall);
show();
recall();
