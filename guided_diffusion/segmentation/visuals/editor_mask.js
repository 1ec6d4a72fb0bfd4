"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const { width, height, categories } = data;
const canvas = byId("mask");
const context = canvas.getContext("2d");

// The mask itself. The canvas only shows it: some browsers add noise to what is read from one.
let mask;
const shares = new Array(256).fill(0);  // pixels of each class
const palette = new Uint32Array(256);
for (const { index, color: [red, green, blue] } of categories) {
  if (index > 0) palette[index] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

async function through(stream, bytes) {
  const all = new Blob([bytes]).stream().pipeThrough(stream);
  return new Uint8Array(await new Response(all).arrayBuffer());
}
const packed = (bytes) => through(new CompressionStream("deflate"), bytes);
const unpacked = (bytes) => through(new DecompressionStream("deflate"), bytes);

/** Show a part of the mask: columns from left to right and rows from top to bottom, inclusive. */
function show(left, top, right, bottom) {
  if (left > right || top > bottom) return;
  const part = context.createImageData(right - left + 1, bottom - top + 1);
  const colors = new Uint32Array(part.data.buffer);
  let at = 0;
  for (let y = top; y <= bottom; y++) {
    for (let i = y * width + left; i <= y * width + right; i++) colors[at++] = palette[mask[i]];
  }
  context.putImageData(part, left, top);
}

class Stroke {
  constructor(after, only) {
    this.after = after;  // the class painted
    this.only = only;  // the class painted over; null: any
    this.places = new Uint32Array(1024);
    this.before = new Uint8Array(1024);
    this.count = 0;
  }

  set(i) {
    const old = mask[i];
    if (old === this.after || (this.only !== null && old !== this.only)) return;
    if (this.count === this.places.length) {
      const places = new Uint32Array(2 * this.count);
      const before = new Uint8Array(2 * this.count);
      places.set(this.places);
      before.set(this.before);
      Object.assign(this, { places, before });
    }
    this.places[this.count] = i;
    this.before[this.count++] = old;
    shares[old]--;
    shares[this.after]++;
    mask[i] = this.after;
  }

  /** Paint the pixels whose centres lie within half a diameter of the line between two points. */
  line([x0, y0], [x1, y1], diameter) {
    const [dx, dy, radius] = [x1 - x0, y1 - y0, diameter / 2];
    const length = dx * dx + dy * dy;
    const left = Math.max(0, Math.floor(Math.min(x0, x1) - radius));
    const right = Math.min(width - 1, Math.ceil(Math.max(x0, x1) + radius));
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - radius));
    const bottom = Math.min(height - 1, Math.ceil(Math.max(y0, y1) + radius));
    for (let y = top; y <= bottom; y++) {
      for (let x = left; x <= right; x++) {
        const [px, py] = [x + 0.5 - x0, y + 0.5 - y0];
        const along = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
        const [ex, ey] = [px - along * dx, py - along * dy];
        if (ex * ex + ey * ey <= radius * radius + 1e-9) this.set(y * width + x);
      }
    }
    show(left, top, right, bottom);
  }

  /** Put the pixels back as they were, or paint them again. */
  apply(back) {
    let [left, right, top, bottom] = [width, -1, height, -1];
    for (let k = 0; k < this.count; k++) {
      const i = this.places[k];
      shares[mask[i]]--;
      mask[i] = back ? this.before[k] : this.after;
      shares[mask[i]]++;
      const [x, y] = [i % width, Math.floor(i / width)];
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
    }
    show(left, top, right, bottom);
  }
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

function chunk(kind, content) {
  const bytes = new Uint8Array(content.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(content, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < content.length + 8; i++) crc = CRC[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  view.setUint32(content.length + 8, ~crc >>> 0);
  return bytes;
}

/** The mask as a grey PNG file of 8 bits. */
async function png() {
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header[8] = 8;
  const rows = new Uint8Array((width + 1) * height);  // each begins with its filter, 0 for none
  for (let y = 0; y < height; y++) {
    rows.set(mask.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  }
  const signature = Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10);
  const parts = [chunk("IHDR", header), chunk("IDAT", await packed(rows))];
  return new Blob([signature, ...parts, chunk("IEND", new Uint8Array())], { type: "image/png" });
}
