// Text → token ids, by the tokenizer.json of a bundle: BERT's normaliser, its words, and WordPiece, as `tokenizers` has them.

const SPACE = /\p{White_Space}/u;
const OTHER = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}]/u;
const ACCENT = /\p{Mn}/gu;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/u;
const SAYS = /[\p{L}\p{N}\p{So}]/u;
const CHINESE = [
  [0x4e00, 0x9fff], [0x3400, 0x4dbf], [0x20000, 0x2a6df], [0x2a700, 0x2b73f], [0x2b740, 0x2b81f], [0x2b920, 0x2ceaf],
  [0xf900, 0xfaff], [0x2f800, 0x2fa1f],
];

/** encode(text) → {ids, truncated, known}; `known`: a word of it is in the vocabulary. `file`: tokenizer.json, parsed. */
export function tokenizer({ model, normalizer, added_tokens: added, post_processor: template }, maxLength) {
  const vocabulary = new Map(Object.entries(model.vocab));
  const unknown = vocabulary.get(model.unk_token);
  const names = new Map(Array.from(vocabulary, ([name, id]) => [id, name]));
  const whole = new Map(added.map(({ content, id }) => [content, id]));
  const quoted = [...whole.keys()].sort((a, b) => b.length - a.length).map((each) => each.replace(/[^\w]/g, "\\$&"));
  const special = new RegExp(quoted.length ? `(${quoted.join("|")})` : "(?!)");
  const steps = template?.single.map((step) => (step.SpecialToken ? template.special_tokens[step.SpecialToken.id].ids : null)) ?? [null];
  const room = maxLength - steps.flat().filter((id) => id !== null).length;

  function normalised(text) {
    let made = "";
    for (const character of text) {
      const code = character.codePointAt(0);
      if (normalizer.clean_text) {
        if (!/[\t\n\r]/.test(character) && (code === 0 || code === 0xfffd || OTHER.test(character))) continue;
        if (SPACE.test(character)) {
          made += " ";
          continue;
        }
      }
      const apart = normalizer.handle_chinese_chars && CHINESE.some(([from, to]) => code >= from && code <= to);
      made += apart ? ` ${character} ` : character;
    }
    if (normalizer.strip_accents ?? normalizer.lowercase) made = made.normalize("NFD").replace(ACCENT, "");
    // By itself each: as a whole, JavaScript knows of a final sigma.
    return normalizer.lowercase ? Array.from(made, (character) => character.toLowerCase()).join("") : made;
  }

  function* words(text) {
    let word = [];
    for (const character of text) {
      const mark = PUNCTUATION.test(character);
      if (!mark && !SPACE.test(character)) {
        word.push(character);
        continue;
      }
      if (word.length) yield word;
      word = [];
      if (mark) yield [character];
    }
    if (word.length) yield word;
  }

  function pieces(word) {
    if (word.length > model.max_input_chars_per_word) return [unknown];
    const ids = [];
    for (let start = 0, end; start < word.length; start = end) {
      let id;
      for (end = word.length; end > start; end--) {
        id = vocabulary.get((start ? model.continuing_subword_prefix : "") + word.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [unknown];
      ids.push(id);
    }
    return ids;
  }

  function read(text) {
    let ids = [];
    for (const part of text.split(special)) {
      if (whole.has(part)) ids.push(whole.get(part));
      else for (const word of words(normalised(part))) ids.push(...pieces(word));
      if (ids.length > room) break;
    }
    const truncated = ids.length > room;
    ids = ids.slice(0, room);
    return { ids, truncated, strange: strangeness(ids) };
  }

  /** The share of unknown tokens, 0 to 1, as service/contract/tokens.py has it. */
  function strangeness(ids) {
    const strange = ids.filter((id) => id === unknown).length;
    const said = ids.filter((id) => id !== unknown && SAYS.test(names.get(id) ?? "")).length;
    return strange && (said ? Math.min(strange / (strange + said), 0.9999) : 1);
  }

  return (text) => {
    let tokens = read(text);
    const plain = text.normalize("NFKC"); // full-width letters, and those of mathematics
    if (tokens.strange && plain !== text) {
      const others = read(plain);
      if (others.ids.length && others.strange < tokens.strange) tokens = others;
    }
    const { ids, truncated, strange } = tokens;
    return { ids: steps.flatMap((step) => step ?? ids), truncated, known: strange < 1 };
  };
}
