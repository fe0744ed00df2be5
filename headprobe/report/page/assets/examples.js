/* A few images in a head's card: as the model sees them, and with the head's attention over them. */
"use strict";

headprobe.examples = (run, layer, head, page, { block, bytes }) => {
  const found = run.examples;
  if (!found || !found.maps[layer]) return null;
  const h = page.html;
  const { shape, values } = bytes(found, `maps ${layer}`, found.maps[layer]);
  const [, heads, rows, columns] = shape;
  const size = rows * columns;

  /** The image in grey, and over it the accent in the strength of the attention; patches are not smoothed. */
  function overlay(image, number) {
    const [height, width] = image.size;
    const zoom = Math.max(1, Math.round(224 / Math.max(height, width)));
    const what = `Attention of layer ${layer}, head ${head} on image ${number + 1}`;
    const element = h("canvas", { width: width * zoom, height: height * zoom, role: "img", "aria-label": what });
    const context = element.getContext("2d");
    const start = (number * heads + head) * size;
    const picture = new Image();
    picture.src = image.picture;
    picture.decode().then(() => {
      context.imageSmoothingEnabled = zoom === 1;
      context.filter = "grayscale(1) brightness(0.62)";
      context.drawImage(picture, 0, 0, element.width, element.height);
      context.filter = "none";
      const [high, wide] = [element.height / rows, element.width / columns];
      for (let patch = 0; patch < size; patch += 1) {
        context.fillStyle = `rgb(255 176 58 / ${(0.88 * values[start + patch]) / 255})`;
        context.fillRect((patch % columns) * wide, Math.floor(patch / columns) * high, wide, high);
      }
    });
    return element;
  }

  const figures = found.images.map((image, number) =>
    h("figure", {}, [
      h("img", { src: image.picture, alt: `Image ${number + 1}: ${image.label}`, title: image.source }),
      overlay(image, number),
      h("figcaption", { class: "small" }, [h("bdi", {}, image.label), image.right ? null : [", taken for ", h("bdi", {}, image.prediction)]]),
    ]),
  );
  return block("On a few images", h("div", { class: "thumbs" }, figures), h("p", { class: "small" }, `Shown is ${found.kinds[layer]}; each map is scaled to its own largest weight. The same images for all heads.`));
};
