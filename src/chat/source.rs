//! Rewrite of a template's source, from Jinja2 as transformers sets it up into what minijinja reads
//! the same way.
//!
//! Text between tags is cut as `trim_blocks` and `lstrip_blocks` cut it, and taken out of the
//! source: it becomes a call that counts its bytes. Arithmetic becomes calls, which follow Python
//! and are counted too. `{% generation %}`, which marks what the assistant wrote and prints its
//! content, becomes a scope.
#![forbid(unsafe_code)]

/// Brackets inside brackets; published templates have some.
const MAX_DEPTH: usize = 64;

/// Words that are no operand, so that a sign after them belongs to what follows.
const KEYWORDS: [&str; 16] =
    ["and", "or", "not", "in", "is", "if", "else", "elif", "for", "recursive", "as", "import", "ignore", "missing", "with", "without"];

/// Names of the functions that the rewritten source calls.
pub(super) const TEXT: &str = "_redraft_text";
pub(super) const MATH: &str = "_redraft_math";
pub(super) const JOIN: &str = "_redraft_join";
pub(super) const EACH: &str = "_redraft_each";
pub(super) const VALUE: &str = "_redraft_value";
pub(super) const SLICE: &str = "_redraft_slice";
pub(super) const SPELLED: &str = "_redraft_spelled";

/// A template that minijinja reads without rules for white space.
#[derive(Debug, PartialEq)]
pub(super) struct Rewritten {
    pub source: String,
    /// Text between tags; `TEXT(i)` prints it.
    pub texts: Vec<String>,
    /// Strings of its expressions.
    pub literals: Vec<String>,
}

/// Rewrites a template. Errors: what does not parse, with its line.
pub(super) fn rewrite(source: &str) -> Result<Rewritten, String> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut writer = Writer { out: String::with_capacity(source.len() * 2), texts: Vec::new() };
    let mut literals = Vec::new();
    let mut at = 0;
    // Whether `at` is the beginning of a line, as Jinja2's lexer follows it.
    let mut line_start = true;
    while at < source.len() {
        let rest = &source[at..];
        let Some((open, kind)) = ["{{", "{%", "{#"].into_iter().filter_map(|tag| Some((rest.find(tag)?, tag))).min() else {
            writer.text(rest);
            break;
        };
        let inner = at + open + 2;
        let sign = source[inner..].chars().next().filter(|c| matches!(c, '-' | '+'));
        writer.text(before(&rest[..open], sign, kind != "{{", line_start));
        let body = inner + sign.map_or(0, |_| 1);
        let line = || source[..inner].matches('\n').count() + 1;
        let fail = |what: String| format!("{what} (line {})", line());
        if kind == "{#" {
            let end = source[body..].find("#}").ok_or_else(|| fail("a comment has no end".into()))? + body;
            let minus = source[body..end].ends_with('-');
            let plus = source[body..end].ends_with('+');
            (at, line_start) = after(source, end + 2, minus, !plus);
            continue;
        }
        let variable = kind == "{{";
        if !variable && let Some(raw) = raw_block(source, body) {
            let (content, sign, end) = raw.map_err(fail)?;
            writer.text(before(content.text, sign, true, content.line_start));
            (at, line_start) = after(source, end.at, end.minus, !end.plus);
            continue;
        }
        let (tokens, end) = tokenize(source, body, if variable { "}}" } else { "%}" }).map_err(fail)?;
        literals.extend(tokens.iter().filter_map(|token| token.literal()));
        let mut parser = Parser { tokens: &tokens, at: 0, depth: 0 };
        if variable {
            let text = parser.sequence().map_err(fail)?;
            writer.out += &format!("{{{{ {text} }}}}");
        } else {
            let word = match tokens.first() {
                Some(Token::Name(word)) => *word,
                _ => return Err(fail("expected the name of a statement".into())),
            };
            parser.at = 1;
            let text = if word == "for" { parser.loop_head() } else { parser.sequence() }.map_err(fail)?;
            let word = match word {
                "generation" => "with",
                "endgeneration" => "endwith",
                word => word,
            };
            writer.out += &format!("{{% {word} {text} %}}");
        }
        (at, line_start) = after(source, end.at, end.minus, !variable && !end.plus);
    }
    Ok(Rewritten { source: writer.out, texts: writer.texts, literals })
}

struct Writer {
    out: String,
    texts: Vec<String>,
}

impl Writer {
    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.out += &format!("{{{{ {TEXT}({}) }}}}", self.texts.len());
            self.texts.push(text.to_owned());
        }
    }
}

/// Text in front of a tag: `-` strips it; without a sign, a block takes the white space of its line
/// away.
fn before(text: &str, sign: Option<char>, block: bool, line_start: bool) -> &str {
    match sign {
        Some('-') => text.trim_end_matches(is_space),
        Some(_) => text,
        None if !block => text,
        None => {
            let line = text.rfind('\n').map_or(0, |at| at + 1);
            if (line > 0 || line_start) && text[line..].chars().all(is_space) { &text[..line] } else { text }
        }
    }
}

/// Where the text after a tag begins, and whether that is the beginning of a line.
fn after(source: &str, end: usize, minus: bool, trim: bool) -> (usize, bool) {
    let rest = &source[end..];
    let skipped = if minus { rest.len() - rest.trim_start_matches(is_space).len() } else { usize::from(trim && rest.starts_with('\n')) };
    (end + skipped, source[..end + skipped].ends_with('\n'))
}

/// White space as Python's `str.isspace` has it.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// End of a tag.
struct End {
    at: usize,
    minus: bool,
    plus: bool,
}

/// Text of a raw block, and whether it begins a line.
struct Raw<'s> {
    text: &'s str,
    line_start: bool,
}

type RawBlock<'s> = Result<(Raw<'s>, Option<char>, End), String>;

/// `{% raw %}`: everything up to its end is text.
fn raw_block(source: &str, body: usize) -> Option<RawBlock<'_>> {
    let rest = source[body..].trim_start_matches(is_space).strip_prefix("raw")?;
    let close = rest.trim_start_matches(is_space);
    let minus = close.starts_with("-%}");
    let close = close.strip_prefix('-').unwrap_or(close).strip_prefix("%}")?;
    let (begin, line_start) = after(source, source.len() - close.len(), minus, false);
    let mut from = begin;
    while let Some(open) = source[from..].find("{%") {
        let open = from + open;
        let sign = source[open + 2..].chars().next().filter(|c| matches!(c, '-' | '+'));
        let inner = source[open + 2 + sign.map_or(0, |_| 1)..].trim_start_matches(is_space);
        if let Some(end) = inner.strip_prefix("endraw").map(|end| end.trim_start_matches(is_space)) {
            let (minus, plus) = (end.starts_with('-'), end.starts_with('+'));
            if let Some(end) = end.strip_prefix(['-', '+']).unwrap_or(end).strip_prefix("%}") {
                let raw = Raw { text: &source[begin..open], line_start };
                return Some(Ok((raw, sign, End { at: source.len() - end.len(), minus, plus })));
            }
        }
        from = open + 2;
    }
    Some(Err("a raw block has no end".into()))
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'s> {
    Text(&'s str),
    Number(&'s str),
    Name(&'s str),
    Op(&'s str),
}

impl<'s> Token<'s> {
    fn text(self) -> &'s str {
        match self {
            Token::Text(text) | Token::Number(text) | Token::Name(text) | Token::Op(text) => text,
        }
    }

    /// What a string says, without its quotes; of the escapes, those that published templates use.
    fn literal(self) -> Option<String> {
        let Token::Text(text) = self else { return None };
        Some(text[1..text.len() - 1].replace("\\n", "\n").replace("\\t", "\t").replace("\\'", "'").replace("\\\"", "\""))
    }

    /// Whether it compares what stands on both sides of it.
    fn compares(self) -> bool {
        matches!(self, Token::Name("in") | Token::Op("==" | "!="))
    }
}

/// Tokens of a tag up to `close`, which brackets hide.
fn tokenize<'s>(source: &'s str, mut at: usize, close: &str) -> Result<(Vec<Token<'s>>, End), String> {
    let mut tokens = Vec::new();
    let mut open = 0usize;
    loop {
        let rest = &source[at..];
        let Some(c) = rest.chars().next() else { return Err("a tag has no end".into()) };
        if open == 0 {
            let (minus, plus) = (c == '-', c == '+' && close == "%}");
            let unsigned = if minus || plus { &rest[1..] } else { rest };
            if unsigned.starts_with(close) {
                return Ok((tokens, End { at: source.len() - unsigned.len() + 2, minus, plus }));
            }
        }
        let len = if is_space(c) {
            at += c.len_utf8();
            continue;
        } else if c == '"' || c == '\'' {
            let mut escaped = false;
            let mut end = None;
            for (i, d) in rest.char_indices().skip(1) {
                if d == c && !escaped {
                    end = Some(i + 1);
                    break;
                }
                escaped = d == '\\' && !escaped;
            }
            let len = end.ok_or("a string has no end")?;
            tokens.push(Token::Text(&rest[..len]));
            len
        } else if c.is_ascii_digit() {
            let len = number(rest, tokens.last() == Some(&Token::Op(".")));
            tokens.push(Token::Number(&rest[..len]));
            len
        } else if c == '_' || c.is_alphabetic() {
            let len = rest.find(|d: char| d != '_' && !d.is_alphanumeric()).unwrap_or(rest.len());
            tokens.push(Token::Name(&rest[..len]));
            len
        } else {
            let len = ["//", "**", "==", "!=", ">=", "<="].iter().find(|op| rest.starts_with(**op)).map_or(c.len_utf8(), |op| op.len());
            match c {
                '(' | '[' | '{' => open += 1,
                ')' | ']' | '}' => open = open.checked_sub(1).ok_or("a bracket closes that was not opened")?,
                _ => {}
            }
            tokens.push(Token::Op(&rest[..len]));
            len
        };
        at += len;
    }
}

/// Bytes of a number; after a dot it is an index.
fn number(text: &str, index: bool) -> usize {
    let digits = |text: &str| text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    let whole = text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
    if index {
        return whole;
    }
    let bytes = text.as_bytes();
    if text.starts_with('0') && bytes.get(1).is_some_and(u8::is_ascii_alphabetic) {
        return digits(text);
    }
    let mut len = whole;
    if bytes.get(len) == Some(&b'.') && bytes.get(len + 1).is_some_and(u8::is_ascii_digit) {
        len += 1 + text[len + 1..].find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len() - len - 1);
    }
    if bytes.get(len).is_some_and(|c| matches!(c, b'e' | b'E')) {
        let sign = usize::from(bytes.get(len + 1).is_some_and(|c| matches!(c, b'+' | b'-')));
        let exponent = text[len + 1 + sign..].find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len() - len - 1 - sign);
        if exponent > 0 {
            len += 1 + sign + exponent;
        }
    }
    len
}

/// Writes expressions anew. Only arithmetic is understood; all else is copied.
struct Parser<'t> {
    tokens: &'t [Token<'t>],
    at: usize,
    depth: usize,
}

/// Operators that bind stronger with each level, as Jinja2 has it: `~` binds stronger than `+`.
const LEVELS: [&[&str]; 4] = [&["+", "-"], &["~"], &["*", "/", "//", "%"], &["**"]];

impl Parser<'_> {
    fn peek(&self) -> Option<Token<'_>> {
        self.tokens.get(self.at).copied()
    }

    fn take(&mut self, out: &mut String) {
        if let Some(token) = self.tokens.get(self.at) {
            out.push_str(token.text());
            out.push(' ');
        }
        self.at += 1;
    }

    fn is_op(&self, op: &str) -> bool {
        self.peek() == Some(Token::Op(op))
    }

    /// Operands and what stands between them, up to the end of the tag.
    fn sequence(&mut self) -> Result<String, String> {
        let out = self.sequence_to("", false)?;
        if self.peek().is_some() { Err("a bracket closes that was not opened".into()) } else { Ok(out) }
    }

    /// The same up to a bracket that closes, which none is where the tag ends, or a colon.
    fn sequence_to(&mut self, close: &str, colon: bool) -> Result<String, String> {
        let mut out = String::new();
        loop {
            let after = self.at > 0 && self.tokens[self.at - 1].compares();
            match self.peek() {
                None if !close.is_empty() => return Err("a bracket has no end".into()),
                None => return Ok(out),
                Some(Token::Op(op)) if op == close || colon && op == ":" => return Ok(out),
                Some(token) if self.begins_operand(token) => {
                    let operand = self.level(0)?;
                    let next = self.tokens.get(self.at + usize::from(self.peek() == Some(Token::Name("not"))));
                    if after || next.is_some_and(|token| token.compares()) {
                        out += &format!("{SPELLED}({operand}) ")
                    } else {
                        out += &operand
                    }
                }
                Some(Token::Op(")" | "]" | "}")) => return Err("a bracket closes another one".into()),
                Some(_) => self.take(&mut out),
            }
        }
    }

    /// `targets in values if condition`: the values become a call.
    fn loop_head(&mut self) -> Result<String, String> {
        let mut out = String::new();
        while let Some(token) = self.peek()
            && token != Token::Name("in")
        {
            self.take(&mut out);
        }
        self.take(&mut out);
        let values = self.level(0)?;
        // Values without brackets around them are several.
        if self.is_op(",") {
            out += &values
        } else {
            out += &format!("{EACH}({values}) ")
        }
        Ok(out + &self.sequence()?)
    }

    fn begins_operand(&self, token: Token) -> bool {
        match token {
            Token::Text(_) | Token::Number(_) => true,
            Token::Name(name) => !KEYWORDS.contains(&name),
            Token::Op(op) => matches!(op, "(" | "[" | "{" | "+" | "-"),
        }
    }

    fn level(&mut self, level: usize) -> Result<String, String> {
        let Some(ops) = LEVELS.get(level) else { return self.unary() };
        let first = self.level(level + 1)?;
        let mut arguments = vec![first];
        while let Some(Token::Op(op)) = self.peek()
            && ops.contains(&op)
        {
            if level != 1 {
                arguments.push(format!("\"{op}\""));
            }
            self.at += 1;
            arguments.push(self.level(level + 1)?);
        }
        Ok(match arguments.len() {
            1 => arguments.swap_remove(0),
            _ => format!("{}({}) ", if level == 1 { JOIN } else { MATH }, arguments.join(", ")),
        })
    }

    /// An operand with its signs, brackets, filters and tests.
    fn unary(&mut self) -> Result<String, String> {
        let mut out = String::new();
        while self.is_op("+") || self.is_op("-") {
            // Python's plus changes nothing.
            if self.is_op("-") {
                out.push('-');
            }
            self.at += 1;
        }
        self.primary(&mut out)?;
        loop {
            match self.peek() {
                Some(Token::Op(".")) => {
                    self.take(&mut out);
                    self.take(&mut out);
                }
                Some(Token::Op("(")) => self.group(&mut out)?,
                Some(Token::Op("[")) => out = self.subscript(&out)?,
                Some(Token::Op("|")) => {
                    self.take(&mut out);
                    self.name(&mut out);
                }
                Some(Token::Name("is")) => {
                    self.take(&mut out);
                    if self.peek() == Some(Token::Name("not")) {
                        self.take(&mut out);
                    }
                    self.name(&mut out);
                    // An argument may stand without brackets.
                    if !self.is_op("(")
                        && let Some(token) = self.peek()
                        && self.begins_operand(token)
                        && !matches!(token, Token::Op("+" | "-"))
                    {
                        match token {
                            Token::Op(_) => self.group(&mut out)?,
                            _ => self.primary(&mut out)?,
                        }
                    }
                }
                _ => return Ok(out),
            }
        }
    }

    fn primary(&mut self, out: &mut String) -> Result<(), String> {
        match self.peek() {
            Some(Token::Op("(")) => self.group(out),
            // Lists and dictionaries are measured, since each may hold others twice.
            Some(Token::Op("[" | "{")) => {
                out.push_str(VALUE);
                out.push('(');
                self.group(out)?;
                out.push_str(") ");
                Ok(())
            }
            Some(Token::Text(_)) => {
                // Strings that follow each other are one.
                let mut texts = Vec::new();
                while let Some(Token::Text(text)) = self.peek() {
                    texts.push(text.to_owned());
                    self.at += 1;
                }
                *out += &match texts.len() {
                    1 => format!("{} ", texts[0]),
                    _ => format!("{JOIN}({}) ", texts.join(", ")),
                };
                Ok(())
            }
            Some(_) => {
                self.take(out);
                Ok(())
            }
            None => Err("an expression has no end".into()),
        }
    }

    /// `[index]` after `value`, or a slice of it.
    fn subscript(&mut self, value: &str) -> Result<String, String> {
        self.enter()?;
        self.at += 1;
        let mut bounds = vec![self.sequence_to("]", true)?];
        while self.is_op(":") {
            self.at += 1;
            bounds.push(self.sequence_to("]", true)?);
        }
        self.at += 1;
        self.depth -= 1;
        if let [index] = bounds.as_slice() {
            return Ok(format!("{value}[ {index}] "));
        }
        let bounds: Vec<&str> = bounds.iter().map(|bound| if bound.is_empty() { "none " } else { bound.as_str() }).collect();
        Ok(format!("{SLICE}({value}, {}) ", bounds.join(", ")))
    }

    fn enter(&mut self) -> Result<(), String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(format!("more than {MAX_DEPTH} brackets inside each other")) } else { Ok(()) }
    }

    /// The name of a filter or test.
    fn name(&mut self, out: &mut String) {
        self.take(out);
        while self.is_op(".") {
            self.take(out);
            self.take(out);
        }
    }

    fn group(&mut self, out: &mut String) -> Result<(), String> {
        self.enter()?;
        let close = match self.peek() {
            Some(Token::Op("(")) => ")",
            Some(Token::Op("[")) => "]",
            _ => "}",
        };
        self.take(out);
        *out += &self.sequence_to(close, false)?;
        self.take(out);
        self.depth -= 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rewritten source with its texts put back, white space of expressions left out.
    fn shown(source: &str) -> String {
        let Rewritten { source, texts, .. } = rewrite(source).expect("it parses");
        let mut shown = source;
        for (i, text) in texts.iter().enumerate() {
            shown = shown.replacen(&format!("{{{{ {TEXT}({i}) }}}}"), &format!("<{text}>"), 1);
        }
        shown.replace(MATH, "M").replace(JOIN, "J").replace(EACH, "E").replace(VALUE, "V").replace(SLICE, "S").replace(SPELLED, "=")
    }

    #[test]
    fn white_space_is_that_of_jinja2() {
        assert_eq!(shown("a\n  {% if x %}\n  b\n  {% endif %}\nc\n"), "<a\n>{% if x  %}<  b\n>{% endif  %}<c>");
        assert_eq!(shown("a {% if x %} b"), "<a >{% if x  %}< b>");
        assert_eq!(shown("a \n {%- if x -%} \n b"), "<a>{% if x  %}<b>");
        assert_eq!(shown("  {%+ if x +%}\n b"), "<  >{% if x  %}<\n b>");
        assert_eq!(shown("{{ x }}  {% if x %}"), "{{ x  }}<  >{% if x  %}");
        assert_eq!(shown("{{ x -}} \n  {% if x %}"), "{{ x  }}{% if x  %}");
        assert_eq!(shown("a\n  {# b #}\nc {#- d -#} e"), "<a\n><c><e>");
        assert_eq!(shown("{{ x }}\ny\r\nz"), "{{ x  }}<\ny\nz>");
        assert_eq!(shown("{% raw %} {{ a }} {% endraw %}\nb"), "< {{ a }} ><b>");
        assert_eq!(shown("{% raw -%} {{ a }}\n  {%- endraw %}"), "<{{ a }}>");
    }

    #[test]
    fn arithmetic_becomes_calls() {
        assert_eq!(shown("{{ a + b ~ c * 2 }}"), "{{ M(a , \"+\", J(b , M(c , \"*\", 2 ) ) )  }}");
        assert_eq!(shown("{{ a - -b }}"), "{{ M(a , \"-\", -b )  }}");
        assert_eq!(shown("{{ '%s' % (a, b) }}"), "{{ M('%s' , \"%\", ( a , b ) )  }}");
        assert_eq!(shown("{{ x[1:-1] + y.z(b=-1)|trim }}"), "{{ M(S(x , 1 , -1 ) , \"+\", y . z ( b = -1 ) | trim )  }}");
        assert_eq!(shown("{{ a + b is none }}"), "{{ M(a , \"+\", b is none )  }}");
        assert_eq!(shown("{{ i is divisibleby 2 + 1 }}"), "{{ M(i is divisibleby 2 , \"+\", 1 )  }}");
        assert_eq!(shown("{% if a and -1 < b %}"), "{% if a and -1 < b  %}");
        assert_eq!(shown("{% if not a not in b.c and d == 'e' %}"), "{% if not =(a ) not in =(b . c ) and =(d ) == =('e' )  %}");
        assert_eq!(shown("{% set ns.x = ns.x + 1 %}"), "{% set ns . x = M(ns . x , \"+\", 1 )  %}");
        assert_eq!(shown("{{ {'a': {'b': 1}}['a'] }}"), "{{ V({ 'a' : V({ 'b' : 1 } ) } ) [ 'a' ]  }}");
        assert_eq!(shown("{{ 'a' \"b\" }}"), "{{ J('a', \"b\")  }}");
        assert_eq!(shown("{{ 'it\\'s %}' }}"), "{{ 'it\\'s %}'  }}");
        assert_eq!(shown("{{ m.0.x + 1.5e3 }}"), "{{ M(m . 0 . x , \"+\", 1.5e3 )  }}");
        assert_eq!(shown("{% for k, v in a + b if v %}"), "{% for k , v in E(M(a , \"+\", b ) ) if v  %}");
        assert_eq!(shown("{% generation %}a{%- endgeneration %}"), "{% with  %}<a>{% endwith  %}");
    }

    #[test]
    fn what_does_not_parse_names_its_line() {
        for source in ["{{ a", "a\n{{ 'b }}", "{# a", "{% raw %}", "{{ (a }}", "{{ a) }}", "{{ (a] }}", "{% %}"] {
            assert!(rewrite(source).expect_err(source).contains("(line "), "{source}");
        }
        assert!(rewrite(&format!("{{{{ {}{} }}}}", "(".repeat(200), ")".repeat(200))).expect_err("deep").contains("brackets"));
    }
}
