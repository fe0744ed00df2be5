"use strict";
headprobe.section("heads", (root, data, page) => {
  root.append(page.html("p", {}, `${data.runs.length} runs`));
});
