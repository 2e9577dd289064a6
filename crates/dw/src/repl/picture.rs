//! Pictures in the terminal: which terminals can show them, and the three ways in which they take them.
//! Two of those are a PNG file inside an escape sequence; sixels come from a crate.
//!
//! The terminal is known by its environment. Asking it would be surer, but one that does not answer would
//! hang the program.

use std::{
    env,
    fmt::Write as _,
    io::{self, Cursor, IsTerminal, Write as _},
    path::Path,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use console::Term;
use icy_sixel::{DiffusionMethod, MethodForLargest, MethodForRep, PixelFormat, Quality};
use image::{DynamicImage, GenericImageView, ImageFormat, imageops::FilterType};

use super::config::PreviewChoice;

/// Widest picture, in columns.
const WIDEST: u32 = 64;
/// Widest look at an unfinished picture, in columns.
const WIDEST_PREVIEW: u32 = 24;
/// Lines of the terminal that a picture leaves free.
const LINES_LEFT: u32 = 5;
/// Pixels of a column, about; a picture is made so large and not larger, for slow lines.
const COLUMN_PIXELS: u32 = 10;
/// Bytes of base64 text that kitty takes in one sequence.
const KITTY_CHUNK: usize = 4096;

/// Endings of the files that can be shown.
const SHOWN: [&str; 6] = ["png", "jpg", "jpeg", "webp", "gif", "bmp"];

/// A way to show a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// <https://sw.kovidgoyal.net/kitty/graphics-protocol>
    Kitty,
    /// <https://iterm2.com/documentation-images.html>
    Iterm,
    /// DEC's, as VT340 terminals had it.
    Sixel,
    /// Characters, each the upper and the lower half of a cell in two colours.
    Blocks,
}

/// How pictures are to be shown here; none for not at all.
pub(super) fn protocol(choice: PreviewChoice) -> Option<Protocol> {
    if !(io::stdout().is_terminal() && io::stdin().is_terminal()) {
        return None;
    }
    match choice {
        PreviewChoice::Off => None,
        PreviewChoice::Always(protocol) => Some(protocol),
        PreviewChoice::Auto => known(|name| env::var(name).ok()),
    }
}

/// What the terminal takes, if it is known. Programs in between, such as tmux, swallow pictures.
fn known(variable: impl Fn(&str) -> Option<String>) -> Option<Protocol> {
    let set = |name: &str| variable(name).is_some_and(|value| !value.is_empty());
    let (term, program) = (variable("TERM").unwrap_or_default(), variable("TERM_PROGRAM").unwrap_or_default());
    let begins = |names: &[&str]| names.iter().any(|name| term.starts_with(name));
    if set("TMUX") || set("STY") || begins(&["screen", "tmux"]) {
        None
    } else if set("KITTY_WINDOW_ID") || program == "ghostty" || begins(&["xterm-kitty", "xterm-ghostty"]) {
        Some(Protocol::Kitty)
    } else if ["iTerm.app", "WezTerm", "mintty", "rio"].contains(&program.as_str()) || set("KONSOLE_VERSION") {
        Some(Protocol::Iterm)
    } else if begins(&["foot", "mlterm", "contour"]) {
        Some(Protocol::Sixel)
    } else {
        None
    }
}

/// Shows a file, if it is a picture.
pub(super) fn show_file(protocol: Protocol, path: &Path) {
    let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_ascii_lowercase);
    if ending.is_some_and(|ending| SHOWN.contains(&ending.as_str())) {
        match image::open(path) {
            Ok(picture) => show(protocol, &picture, WIDEST),
            Err(error) => tracing::warn!("{} cannot be shown: {error}", path.display()),
        }
    }
}

/// Shows a look at an unfinished picture.
pub(super) fn show_preview(protocol: Protocol, png: &[u8]) {
    match image::load_from_memory(png) {
        Ok(picture) => show(protocol, &picture, WIDEST_PREVIEW),
        Err(error) => tracing::warn!("a preview cannot be shown: {error}"),
    }
}

fn show(protocol: Protocol, picture: &DynamicImage, widest: u32) {
    let columns = columns(picture.dimensions(), Term::stdout().size(), widest);
    match sequence(protocol, picture, columns) {
        Ok(text) => {
            let mut out = io::stdout().lock();
            // A terminal that went away sees no pictures.
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        }
        Err(reason) => tracing::warn!("a picture cannot be shown: {reason}"),
    }
}

/// Columns that a picture takes, so that it fits into a terminal of so many rows and columns. A row is as
/// high as two columns are wide.
fn columns((width, height): (u32, u32), (rows, columns): (u16, u16), widest: u32) -> u32 {
    let rows = u32::from(rows).saturating_sub(LINES_LEFT).max(2);
    let by_height = u64::from(2 * rows) * u64::from(width) / u64::from(height.max(1));
    widest.min(columns.into()).min(by_height.try_into().unwrap_or(widest)).max(1)
}

/// What makes a terminal show a picture that many columns wide, with a line break at its end.
fn sequence(protocol: Protocol, picture: &DynamicImage, columns: u32) -> Result<String, String> {
    let (width, height) = picture.dimensions();
    let widest = columns * COLUMN_PIXELS;
    let scaled = || if width > widest { picture.resize(widest, height, FilterType::Triangle) } else { picture.clone() };
    Ok(match protocol {
        Protocol::Kitty => kitty(&BASE64_STANDARD.encode(png(&scaled())?), columns),
        Protocol::Iterm => {
            let file = png(&scaled())?;
            let text = BASE64_STANDARD.encode(&file);
            format!("\x1b]1337;File=inline=1;size={};width={columns};preserveAspectRatio=1:{text}\x07\n", file.len())
        }
        Protocol::Sixel => sixels(&scaled())?,
        Protocol::Blocks => blocks(picture, columns),
    })
}

fn png(picture: &DynamicImage) -> Result<Vec<u8>, String> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).map_err(|error| error.to_string())?;
    Ok(bytes.into_inner())
}

/// A picture in pieces; `m=1` says that more follow, `q=2` that no answer is wanted.
fn kitty(base64: &str, columns: u32) -> String {
    let mut text = String::new();
    let pieces = base64.len().div_ceil(KITTY_CHUNK);
    for index in 0..pieces {
        let piece = &base64[index * KITTY_CHUNK..base64.len().min((index + 1) * KITTY_CHUNK)];
        let keys = if index == 0 { format!("a=T,f=100,q=2,c={columns},") } else { String::new() };
        let _ = write!(text, "\x1b_G{keys}m={};{piece}\x1b\\", u8::from(index + 1 < pieces));
    }
    text + "\n"
}

fn sixels(picture: &DynamicImage) -> Result<String, String> {
    let pixels = picture.to_rgb8();
    let (width, height) = (pixels.width() as i32, pixels.height() as i32);
    let encoded = icy_sixel::sixel_string(
        pixels.as_raw(),
        width,
        height,
        PixelFormat::RGB888,
        DiffusionMethod::Auto,
        MethodForLargest::Auto,
        MethodForRep::Auto,
        Quality::HIGH,
    );
    encoded.map(|text| text + "\n").map_err(|error| format!("{error:?}"))
}

/// A picture of half cells.
fn blocks(picture: &DynamicImage, columns: u32) -> String {
    let (width, height) = picture.dimensions();
    let rows = (u64::from(columns) * u64::from(height) / u64::from(width.max(1)) / 2).clamp(1, 500) as u32;
    let small = picture.resize_exact(columns, rows * 2, FilterType::Triangle).to_rgb8();
    let mut text = String::new();
    for row in 0..rows {
        for column in 0..columns {
            let [r, g, b] = small.get_pixel(column, row * 2).0;
            let _ = write!(text, "\x1b[38;2;{r};{g};{b}m");
            let [r, g, b] = small.get_pixel(column, row * 2 + 1).0;
            let _ = write!(text, "\x1b[48;2;{r};{g};{b}m▀");
        }
        text += "\x1b[0m\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage};

    use super::*;

    fn picture(width: u32, height: u32) -> DynamicImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([x as u8, y as u8, (x * y) as u8])).into()
    }

    #[test]
    fn terminals_are_known_by_their_variables() {
        let terminal = |variables: &[(&str, &str)]| {
            known(|name| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(terminal(&[("KITTY_WINDOW_ID", "1"), ("TERM", "xterm-kitty")]), Some(Protocol::Kitty));
        let iterm = [("TERM_PROGRAM", "iTerm.app"), ("TERM", "xterm-256color")];
        assert_eq!(terminal(&iterm), Some(Protocol::Iterm));
        assert_eq!(terminal(&[("TERM", "foot-extra")]), Some(Protocol::Sixel));
        assert_eq!(terminal(&[("TERM", "xterm-256color")]), None);
        assert_eq!(terminal(&[]), None);
        assert_eq!(terminal(&[("KITTY_WINDOW_ID", "1"), ("TMUX", "/tmp/x"), ("TERM", "tmux-256color")]), None);
    }

    #[test]
    fn a_picture_fits_into_the_terminal() {
        assert_eq!(columns((128, 128), (50, 200), 64), 64);
        assert_eq!(columns((128, 128), (24, 80), 64), 38);
        assert_eq!(columns((100, 800), (24, 80), 64), 4);
        assert_eq!(columns((128, 128), (50, 30), 64), 30);
        assert_eq!(columns((1, 4_000_000_000), (1, 1), 64), 1);
    }

    #[test]
    fn kitty_gets_the_file_in_pieces_of_which_all_but_the_last_announce_more() {
        let text = sequence(Protocol::Kitty, &picture(200, 200), 40).expect("a sequence");
        let pieces: Vec<&str> = text.trim_end().split_terminator("\x1b\\").collect();
        assert!(pieces.len() > 1 && pieces[0].starts_with("\x1b_Ga=T,f=100,q=2,c=40,m=1;"), "{}", pieces.len());
        assert!(pieces.last().is_some_and(|piece| piece.starts_with("\x1b_Gm=0;")));
        let base64: String = pieces.iter().filter_map(|piece| piece.split_once(';')).map(|(_, text)| text).collect();
        let file = BASE64_STANDARD.decode(base64).expect("base64");
        assert_eq!(image::load_from_memory(&file).expect("a PNG file").dimensions(), (200, 200));
    }

    #[test]
    fn large_pictures_are_made_smaller_before_they_are_sent() {
        let text = sequence(Protocol::Iterm, &picture(1000, 500), 20).expect("a sequence");
        let base64 = text.split_once(':').and_then(|(_, rest)| rest.split_once('\x07')).expect("a file").0;
        let file = BASE64_STANDARD.decode(base64).expect("base64");
        assert!(text.contains(&format!("size={};width=20", file.len())));
        assert_eq!(image::load_from_memory(&file).expect("a PNG file").dimensions(), (200, 100));
    }

    #[test]
    fn sixels_are_a_device_control_string() {
        let text = sequence(Protocol::Sixel, &picture(12, 12), 40).expect("a sequence");
        assert!(text.starts_with("\x1bP") && text.trim_end().ends_with("\x1b\\"));
    }

    #[test]
    fn blocks_are_half_as_many_lines_as_columns() {
        let text = sequence(Protocol::Blocks, &picture(64, 64), 20).expect("a sequence");
        assert_eq!(text.lines().count(), 10);
        assert!(text.lines().all(|line| line.matches('▀').count() == 20));
    }
}
