//! Class names and colours: Cityscapes, CamVid, and generated ones for any other number.

/// A class: its name and its colour (RGB).
pub type Class = (&'static str, [u8; 3]);

/// The 19 evaluated classes of Cityscapes in trainId order, with the official colours
/// (Cordts et al., CVPR 2016; cityscapesScripts, `labels.py`).
pub const CITYSCAPES: [Class; 19] = [
    ("road", [128, 64, 128]),
    ("sidewalk", [244, 35, 232]),
    ("building", [70, 70, 70]),
    ("wall", [102, 102, 156]),
    ("fence", [190, 153, 153]),
    ("pole", [153, 153, 153]),
    ("traffic light", [250, 170, 30]),
    ("traffic sign", [220, 220, 0]),
    ("vegetation", [107, 142, 35]),
    ("terrain", [152, 251, 152]),
    ("sky", [70, 130, 180]),
    ("person", [220, 20, 60]),
    ("rider", [255, 0, 0]),
    ("car", [0, 0, 142]),
    ("truck", [0, 0, 70]),
    ("bus", [0, 60, 100]),
    ("train", [0, 80, 100]),
    ("motorcycle", [0, 0, 230]),
    ("bicycle", [119, 11, 32]),
];

/// CamVid's 11 classes in SegNet's order and colours (Badrinarayanan et al., PAMI 2017).
pub const CAMVID: [Class; 11] = [
    ("Sky", [128, 128, 128]),
    ("Building", [128, 0, 0]),
    ("Pole", [192, 192, 128]),
    ("Road", [128, 64, 128]),
    ("Pavement", [60, 40, 222]),
    ("Tree", [128, 128, 0]),
    ("SignSymbol", [192, 128, 128]),
    ("Fence", [64, 64, 128]),
    ("Car", [64, 0, 128]),
    ("Pedestrian", [64, 64, 0]),
    ("Bicyclist", [0, 128, 192]),
];

/// The first name that is no name, in words: an empty one, or one that would break the lines of a
/// report or steer the terminal that shows it.
pub fn unfit(names: &[String]) -> Option<String> {
    let unfit = |name: &&String| name.trim().is_empty() || name.contains(char::is_control);
    let index = names.iter().position(|name| unfit(&name))?;
    let name = &names[index];
    let empty = name.trim().is_empty();
    Some(if empty { format!("an empty one at index {index}") } else { format!("{name:?}") })
}

/// The first name that stands there twice, spaces around it aside, in words: figures and pictures tell
/// classes apart by their names.
pub fn repeated(names: &[String]) -> Option<String> {
    let first = |name: &str| names.iter().position(|other| other.trim() == name.trim());
    let mut pairs = names.iter().enumerate().filter_map(|(i, name)| Some((name, first(name)?, i)));
    let (name, first, again) = pairs.find(|(_, first, i)| first < i)?;
    Some(format!("{name:?} at index {first} and {again}"))
}

/// Names and colours for a number of classes: Cityscapes' for 19, CamVid's for 11, else
/// "class 0" .. with Pascal VOC's colour map, which is distinct for every index.
pub fn table(count: usize) -> (Vec<String>, Vec<[u8; 3]>) {
    let known = |classes: &[Class]| {
        classes.iter().map(|(name, colour)| (name.to_string(), *colour)).unzip()
    };
    match count {
        19 => known(&CITYSCAPES),
        11 => known(&CAMVID),
        // Index 0 of the map is black, which stands for void.
        _ => (0..count).map(|i| (format!("class {i}"), voc_colour(i + 1))).unzip(),
    }
}

/// Pascal VOC's colour map: bits 0, 1, 2 of the index become the top bits of red, green, blue,
/// the next three the bits below, and so on.
fn voc_colour(index: usize) -> [u8; 3] {
    let channel = |c: usize| (0..3).map(|i| ((index >> (3 * i + c) & 1) << (7 - i)) as u8).sum();
    [channel(0), channel(1), channel(2)]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn colours_are_distinct_and_never_black() {
        for count in [1, 2, 11, 19, 150, 255] {
            let (names, colours) = table(count);
            assert_eq!((names.len(), colours.len()), (count, count));
            assert_eq!(names.iter().collect::<HashSet<_>>().len(), count);
            assert_eq!(colours.iter().collect::<HashSet<_>>().len(), count);
            assert!(!colours.contains(&[0, 0, 0]));
        }
    }
}
