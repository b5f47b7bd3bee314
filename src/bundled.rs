//! What the binary carries with it, so that it works from any folder: the trained model and an
//! example photo.

use crate::error::Result;
use crate::model::Model;

/// Name of the bundled model.
pub const MODEL_NAME: &str = "fpenet-camvid.safetensors";

/// Name of the example photo.
pub const PHOTO_NAME: &str = "street.jpg";

/// The example photo, a JPEG; origin and licence in `assets/example/README.md`.
pub const PHOTO: &[u8] = include_bytes!("../assets/example/street.jpg");

#[cfg(bundled_model)]
const MODEL: Option<&[u8]> = Some(include_bytes!("../models/fpenet-camvid.safetensors"));
#[cfg(not(bundled_model))]
const MODEL: Option<&[u8]> = None;

/// The bundled model.
///
/// # Errors
/// [`Error::Failed`](crate::Error::Failed) in a build that was made without the model file.
pub fn model() -> Result<Model> {
    match MODEL {
        Some(bytes) => Model::from_bytes(bytes, std::path::Path::new(MODEL_NAME)),
        None => Err(crate::Error::Failed(format!(
            "this build carries no model (models/{MODEL_NAME} was missing when it was built): \
             name one with --model FILE"
        ))),
    }
}
