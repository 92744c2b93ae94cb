// The page over all results: filters for claims, and links that open what they lead to.
"use strict";
const form = document.querySelector(".filters"), claims = [...document.querySelectorAll("details.claim")];
const strip = [...document.querySelectorAll(".filter")], fold = form.elements.fold;
function filter() {
  const { verdict, data, source, words } = form.elements, wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const claim of claims) {
    const text = claim.textContent.toLowerCase();
    const fits = (!verdict.value || claim.dataset.verdict === verdict.value) && (!source.value || claim.dataset.source === source.value) &&
      (!data.value || claim.dataset.data.split(" ").includes(data.value)) && wanted.every(word => text.includes(word));
    claim.hidden = !fits;
    shown += fits;
  }
  for (const button of strip) button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict.value));
  form.querySelector("output").textContent = shown === claims.length ? "" : `${shown} of ${claims.length} claims`;
}
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
for (const button of strip) button.addEventListener("click", () => {
  form.elements.verdict.value = form.elements.verdict.value === button.dataset.verdict ? "" : button.dataset.verdict;
  filter();
});
fold.addEventListener("click", () => {
  const open = fold.textContent === "Open all";
  claims.forEach(claim => { claim.open = open; });
  fold.textContent = open ? "Close all" : "Open all";
});
function follow() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  if (target.hidden) { form.reset(); filter(); }
  if (target.tagName === "DETAILS") target.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", follow);
document.querySelectorAll(".strip a").forEach(link => link.addEventListener("click", () => setTimeout(follow)));
filter();
follow();
