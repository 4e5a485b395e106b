(function () {
  "use strict";
  var page = document.documentElement;
  page.classList.add("js");
  var search = document.getElementById("search");
  if (!search) { return; }
  var capability = document.getElementById("capability");
  var verdict = document.getElementById("verdict");
  var count = document.getElementById("count");
  var none = document.getElementById("none");
  var rows = Array.prototype.slice.call(document.querySelectorAll("#methods tbody tr"));
  var texts = rows.map(function (row) { return row.textContent.toLowerCase(); });
  function update() {
    var words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    var shown = 0;
    rows.forEach(function (row, i) {
      var fits = words.every(function (word) { return texts[i].indexOf(word) >= 0; }) &&
        (!capability.value || row.dataset.capability === capability.value) &&
        (!verdict.value || row.dataset.verdict === verdict.value);
      row.hidden = !fits;
      if (fits) { shown += 1; }
    });
    count.textContent = (shown === rows.length ? "" : shown + " of ") + rows.length + " methods";
    none.hidden = shown > 0;
  }
  search.addEventListener("input", update);
  capability.addEventListener("change", update);
  verdict.addEventListener("change", update);
  update();
})();
