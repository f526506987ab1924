// Before the first paint: the theme that was chosen, else that of the system.
const chosen = localStorage.getItem("isthmus-theme");
if (chosen) document.documentElement.dataset.theme = chosen;
