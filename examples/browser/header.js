// What a picture's file says of itself before it is decoded. Nothing of a file is trusted further than that.

const ORIENTATION = 0x0112; // a tag of EXIF: 1 as stored, 2 to 8 turned or mirrored

/**
 * The header of a picture.
 *
 * @param {Uint8Array} bytes - a whole file.
 * @returns {?{format: string, width: ?number, height: ?number, orientation: ?number, packed: ?boolean}}
 *     Pillow's name of the format; pixels as stored (null: only decoding tells); the orientation that EXIF says (null:
 *     none); whether there are words of EXIF or XMP that are not read here. null: no picture that is known.
 * @throws {RangeError} a file that ends within its header.
 */
export function readHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const said = (at, length) => String.fromCharCode(...bytes.subarray(at, at + length));
  if (said(0, 3) === "\xff\xd8\xff") return jpeg(view, said);
  if (said(0, 8) === "\x89PNG\r\n\x1a\n") return png(view, said);
  if (said(0, 4) === "RIFF" && said(8, 4) === "WEBP") return webp(view, said);
  if (["GIF87a", "GIF89a"].includes(said(0, 6))) {
    return { format: "GIF", width: view.getUint16(6, true), height: view.getUint16(8, true), orientation: null };
  }
  if (said(0, 2) === "BM") {
    const old = view.getUint32(14, true) === 12;
    const [width, height] = old
      ? [view.getUint16(18, true), view.getUint16(20, true)]
      : [view.getInt32(18, true), Math.abs(view.getInt32(22, true))]; // negative: from the top down
    return { format: "BMP", width, height, orientation: null };
  }
  if (["II*\0", "MM\0*"].includes(said(0, 4))) return { format: "TIFF", width: null, height: null, orientation: null };
  if (said(4, 4) === "ftyp" && ["avif", "avis"].includes(said(8, 4))) {
    return { format: "AVIF", width: null, height: null, orientation: null };
  }
  return null;
}

function jpeg(view, said) {
  const found = { format: "JPEG", width: null, height: null, orientation: null };
  for (let at = 2; ; ) {
    if (view.getUint8(at) !== 0xff) return found; // damaged: the decoder will say so
    const marker = view.getUint8(at + 1);
    if (marker === 0xff) {
      at += 1; // filling
      continue;
    }
    if (marker === 0xda || marker === 0xd9) return found; // the pixels begin
    if (marker === 0xe1 && said(at + 4, 6) === "Exif\0\0") found.orientation ??= orientationAt(view, at + 10);
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      found.height = view.getUint16(at + 5);
      found.width = view.getUint16(at + 7);
    }
    at += 2 + view.getUint16(at + 2);
  }
}

function png(view, said) {
  const found = { format: "PNG", width: view.getUint32(16), height: view.getUint32(20), orientation: null };
  for (let at = 8; at + 12 <= view.byteLength; at += 12 + view.getUint32(at)) {
    const kind = said(at + 4, 4);
    if (kind === "eXIf") found.orientation = orientationAt(view, at + 8);
    if (["tEXt", "zTXt", "iTXt"].includes(kind) && said(at + 8, 22) === "Raw profile type exif\0") found.packed = true;
    if (kind === "iTXt" && said(at + 8, 19) === "XML:com.adobe.xmp\0\x01") found.packed = true; // 1: compressed
  }
  return found;
}

function webp(view, said) {
  const found = { format: "WEBP", width: null, height: null, orientation: null };
  const low24 = (at) => view.getUint16(at, true) + (view.getUint8(at + 2) << 16);
  for (let at = 12, length; at + 8 <= view.byteLength; at += 8 + length + (length % 2)) {
    const kind = said(at, 4);
    length = view.getUint32(at + 4, true);
    if (kind === "VP8X") {
      [found.width, found.height] = [low24(at + 12) + 1, low24(at + 15) + 1];
    } else if (kind === "VP8L") {
      const packed = view.getUint32(at + 9, true);
      found.width ??= (packed & 0x3fff) + 1;
      found.height ??= ((packed >> 14) & 0x3fff) + 1;
    } else if (kind === "VP8 ") {
      found.width ??= view.getUint16(at + 14, true) & 0x3fff;
      found.height ??= view.getUint16(at + 16, true) & 0x3fff;
    } else if (kind === "EXIF") {
      found.orientation = orientationAt(view, at + 8 + (said(at + 8, 6) === "Exif\0\0" ? 6 : 0));
    }
  }
  return found;
}

/** The orientation in the first directory of EXIF, which begins as a TIFF does; null: it has none, or is damaged. */
function orientationAt(view, start) {
  try {
    const little = view.getUint16(start) === 0x4949;
    const directory = start + view.getUint32(start + 4, little);
    for (let entry = 0; entry < view.getUint16(directory, little); entry++) {
      const at = directory + 2 + 12 * entry;
      if (view.getUint16(at, little) === ORIENTATION) return view.getUint16(at + 8, little);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return null;
}
