// A page that is opened as a file may load no modules, and one whose files are not whole ends at the first that is missing:
// both would stay empty without a word.
const say = (text) => (document.getElementById("found").textContent = text);
addEventListener("error", ({ message }) => message && say(message));
if (location.protocol === "file:") {
  say("Browsers do not let a page that is opened as a file search. Serve its folder: python -m http.server, then http://localhost:8000");
}
