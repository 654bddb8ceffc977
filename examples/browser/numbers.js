// Numbers as Python rounds and writes them.

/** To the nearest whole number, halves to the even one, as Python rounds. */
export function round(x) {
  const below = Math.floor(x);
  if (x - below !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

/** A number in so many digits, as Python's %g writes it, but for a half of the last digit, which is rounded up here. */
export function digits(number, count) {
  const [mantissa, exponent] = number.toExponential(count - 1).split("e");
  const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (exponent >= -4 && exponent < count) return bare(number.toFixed(count - 1 - exponent));
  return `${bare(mantissa)}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
}
