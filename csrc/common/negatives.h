// Which rows contrast with which in infonce.
#pragma once

namespace pix2rep {

enum class Negatives { joint, cross, forward };

}  // namespace pix2rep
