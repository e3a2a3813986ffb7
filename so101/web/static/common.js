// What the pages share; loaded before each one's own script.
"use strict";

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]; // Okabe and Ito, as in plots.py

const $ = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

/** A new element with its properties and children. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A number as people read it, in 4 digits, as runlog.in_words does. */
function inWords(value) {
  if (Number.isInteger(value)) return `${value}`;
  return Math.abs(value) >= 1e4 ? value.toFixed(0) : `${Number(value.toPrecision(4))}`;
}

/** A pen in CSS pixels on a canvas that is as sharp as the screen, and the canvas's width and height in them. */
function fit(canvas) {
  const scale = window.devicePixelRatio;
  const { clientWidth: width, clientHeight: height } = canvas; // within its border
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  return [pen, width, height];
}
